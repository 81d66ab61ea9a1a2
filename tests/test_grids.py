"""Grids against the printed numbers, diffusers, torch's arithmetic and the rules of their origins."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

from trt_wan.errors import UsageError
from trt_wan.runtime.sampling.grids import GRIDS, beta_quantile, schedule, schedule_of

STEPS = [1, 2, 3, 4, 6, 20]


def test_printed_grids() -> None:
    """model_spec.md 4.1."""
    four = {
        "official": ([999, 937, 833, 624], [0.9998, 0.937265, 0.833055, 0.624687, 0]),
        "linear": ([1000, 937, 833, 625], [1, 0.9375, 0.833333, 0.625, 0]),
        "diffusers": ([999, 937, 833, 625], [0.999999, 0.937578, 0.833611, 0.625936, 0]),
        "simple": ([1000, 937.5, 833.333, 625], [1, 0.9375, 0.833333, 0.625, 0]),
        "lightx2v": ([1000, 937.5, 833.333, 625], [1, 0.9375, 0.833333, 0.625, 0]),
    }
    for grid, (timesteps, sigmas) in four.items():
        plan = schedule(grid, 4, 5.0)
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=0, atol=1e-3)
        np.testing.assert_allclose(plan.sigmas, sigmas, rtol=0, atol=1e-6)
        assert plan.sigmas[-1] == 0
    dpm = "1000 989 978 965 952 937 921 902 882 859 833 803 769 729 681 625 555 468 357 208"
    unipc = "999 989 978 965 952 937 920 902 882 859 833 803 768 728 681 624 555 468 356 208"
    assert list(schedule("linear", 20, 5.0).timesteps) == [float(t) for t in dpm.split()]
    assert list(schedule("official", 20, 5.0).timesteps) == [float(t) for t in unipc.split()]
    tail = schedule("diffusers", 20, 5.0).sigmas[16:20]
    np.testing.assert_allclose(tail, [0.556788, 0.470407, 0.359433, 0.211622], atol=1e-6)


def test_the_wrappers_printed_steps() -> None:
    """kijai_semantics.md 6.2: sigmas and timesteps of 4 steps, timesteps of 6."""
    four = schedule("kijai", 4, 5.0)
    np.testing.assert_allclose(four.sigmas, [1, 0.9375, 0.8333, 0.6249, 0], rtol=0, atol=6e-5)
    assert four.timesteps == (999, 937, 833, 624)
    assert schedule("kijai", 6, 5.0).timesteps == (999, 961, 909, 833, 714, 499)


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [*STEPS, 30, 333])
def test_the_wrappers_grid(steps: int, shift: float) -> None:
    """The first level is made in a float32 tensor and shifted there, then all are shifted in float64."""
    top = torch.from_numpy(1.0 - np.linspace(1, 1 / 1000, 1000)[::-1][:1]).float()
    first = (shift * top / (1 + (shift - 1) * top)).item()
    levels = np.linspace(first, 0.0, steps + 1)[:-1]
    levels = shift * levels / (1 + (shift - 1) * levels)
    plan = schedule("kijai", steps, shift)
    assert list(plan.sigmas) == [*levels.astype(np.float32).tolist(), 0.0]
    assert list(plan.timesteps) == torch.from_numpy(levels * 1000).to(torch.int64).tolist()


def test_the_official_grid_starts_at_a_float32() -> None:
    """Thirds of a float64 0.999 would be truncated to 665 and 332."""
    assert schedule("official", 3, 1.0).timesteps == (999, 666, 333)


@pytest.mark.parametrize("grid", ["linear", "simple", "normal", "sgm_uniform", "beta"])
def test_these_start_at_one(grid: str) -> None:
    for shift in (1.0, 3.0, 5.0, 8.0):
        assert schedule(grid, 7, shift).sigmas[0] == 1.0


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [*STEPS, 7, 50, 999, 1000])
def test_grid_of_diffusers(steps: int, shift: float) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    plan = schedule("diffusers", steps, shift)
    assert list(plan.sigmas) == scheduler.sigmas.tolist()
    assert list(plan.timesteps) == scheduler.timesteps.tolist()


def table(shift: float) -> torch.Tensor:
    """ComfyUI's 1000 rising levels, float32."""
    t = torch.arange(1, 1001) / 1000
    return shift * t / (1 + (shift - 1) * t)


def same_levels(grid: str, steps: int, shift: float, sigmas: list[float]) -> None:
    """Within a rounding of float32."""
    plan = schedule(grid, steps, shift)
    np.testing.assert_allclose(plan.sigmas[:-1], sigmas, rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(plan.timesteps, 1000 * np.array(sigmas), rtol=0, atol=1.2e-4)


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [*STEPS, 7, 30, 333, 1000])
def test_simple_grid_of_comfyui(steps: int, shift: float) -> None:
    """A float32 table of 1000 rising sigmas, read from its end at a truncated stride."""
    stride = 1000 / steps
    same_levels("simple", steps, shift, [table(shift)[-1 - int(i * stride)].item() for i in range(steps)])


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [*STEPS, 30])
def test_normal_grids_of_comfyui(steps: int, shift: float) -> None:
    """Timesteps evenly spaced from the table's last level to its first, and shifted once more."""
    start, end = (1000 * table(shift)[k].item() for k in (-1, 0))
    for grid, times in (
        ("normal", torch.linspace(start, end, steps)),
        ("sgm_uniform", torch.linspace(start, end, steps + 1)[:-1]),
    ):
        same_levels(
            grid, steps, shift, (shift * (times / 1000) / (1 + (shift - 1) * (times / 1000))).tolist()
        )


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler])
@pytest.mark.parametrize("steps", [*STEPS, 30])
def test_normal_is_the_grid_of_diffusers_euler_and_lcm(scheduler: type, steps: int) -> None:
    made = scheduler(shift=5.0)
    made.set_timesteps(steps)
    same_levels("normal", steps, 5.0, made.sigmas[:-1].tolist())


# numpy.rint(scipy.stats.beta.ppf(1 - numpy.linspace(0, 1, n, endpoint=False), 0.6, 0.6) * 999), scipy 1.17.1
BETA = {
    4: "999 823 500 176",
    8: "999 942 823 670 500 329 176 57",
    20: "999 986 959 922 876 823 765 703 637 569 500 430 362 296 234 176 123 77 40 13",
    30: "999 993 979 959 936 908 876 842 805 765 724 681 637 591 546 500 453 408 362 318 275 234 194 157 123 "
    "91 63 40 20 6",
}


@pytest.mark.parametrize("steps", BETA)
def test_beta_grid_of_comfyui(steps: int) -> None:
    same_levels("beta", steps, 5.0, [table(5.0)[int(place)].item() for place in BETA[steps].split()])


def test_the_beta_grid_counts_a_level_once() -> None:
    plan = schedule("beta", 1000, 5.0)
    assert plan.steps == 847 == len(plan.sigmas) - 1 and len(set(plan.sigmas)) == 848  # scipy: 847 as well


def test_quantiles_of_the_beta_distribution() -> None:
    """Each against the share that mpmath integrates up to it, with 40 digits."""
    shares = [1e-12, 1e-6, *np.linspace(0.001, 0.999, 41).tolist(), 0.49999999, 0.5, 0.50000001, 1.0]
    with mpmath.workdps(40):
        worst = max(
            abs(mpmath.betainc(0.6, 0.6, 0, beta_quantile(p), regularized=True) / p - 1) for p in shares
        )
    assert worst < 4e-15 and beta_quantile(0.0) == 0.0


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_every_grid_falls_to_zero(grid: str, steps: int) -> None:
    if grid == "lightx2v":
        with pytest.raises(UsageError, match="lightx2v has 4 steps"):
            schedule(grid, steps, 5.0)
        return
    plan = schedule(grid, steps, 5.0)
    assert plan.steps == steps and len(plan.sigmas) == steps + 1
    assert (np.diff(plan.sigmas) < 0).all() and plan.sigmas[0] <= 1 and plan.sigmas[-1] == 0
    assert all(-1e-4 < 1000 * s - t < 1.001 for s, t in zip(plan.sigmas, plan.timesteps, strict=False))
    assert all(s == np.float32(s) for s in plan.sigmas)


def test_a_part_of_the_steps() -> None:
    plan = schedule("linear", 4, 5.0)
    part = plan.part(1, 3)
    assert (part.sigmas, part.timesteps, part.steps) == (plan.sigmas[1:4], plan.timesteps[1:3], 2)


@pytest.mark.parametrize("levels", [(1, 0.94, 0.83, 0.62, 0), (1, 0.94, 0.83, 0.62), (0.3,), (0.3, 0)])
def test_levels_of_ones_own(levels: tuple[float, ...]) -> None:
    """The wrapper keeps them in a float32 tensor, and truncates a thousand times them to integers."""
    given = torch.tensor([level for level in levels if level])
    plan = schedule_of(levels)
    assert plan.sigmas == (*given.tolist(), 0.0)
    assert list(plan.timesteps) == (given * 1000).to(torch.int64).tolist()


@pytest.mark.parametrize(
    "levels",
    [
        (),
        (0,),
        (1.01, 0.5),
        (0.5, 0.5),
        (0.5, 0.6),
        (0.5, -0.1),
        (0.5, 0, 0),
        (1, math.nan, 0),
        (math.inf, 0.5),
        (1e39, 0.5),
    ],
)
def test_levels_that_do_not_fall_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="do not fall from at most 1 towards 0") as caught:
        schedule_of(levels)
    assert "--sigmas 1,0.94" in caught.value.hint
    with pytest.raises(UsageError):
        schedule_of([float(Fraction(1001 - k, 1001)) for k in range(1001)])


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        schedule("linear", 4, 5.0).sigmas[0] = 2.0  # type: ignore[index]


@pytest.mark.parametrize(
    "grid, steps, shift, message, hint",
    [
        ("karras", 4, 5.0, "no grid called 'karras'", "official, linear, diffusers, kijai, simple"),
        ("simple", 0, 5.0, "0 steps", "--steps from 1 to 1000"),
        ("simple", 1001, 5.0, "1001 steps", "--steps from 1 to 1000"),
        ("simple", 4, 0.0, "A shift of 0.0", "--shift 5"),
        ("simple", 4, -1.0, "A shift of -1.0", "--shift 5"),
        ("simple", 4, float("nan"), "A shift of nan", "--shift 5"),
        ("simple", 4, float("inf"), "A shift of inf", "--shift 5"),
        ("simple", 1000, 1e6, "the same noise level", "smaller --shift"),
        ("diffusers", 20, 1e6, "the same noise level", "smaller --shift"),
        ("kijai", 4, 1e39, "the same noise level", "smaller --shift"),
        ("simple", 4, 1e-17, "the same noise level", "fewer --steps"),
        ("lightx2v", 5, 5.0, "has 4 steps, not 5", "--steps 4"),
    ],
)
def test_what_cannot_be_scheduled(grid: str, steps: int, shift: float, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        schedule(grid, steps, shift)
    assert hint in caught.value.hint
