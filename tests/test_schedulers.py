"""Grids against the printed numbers, diffusers and ComfyUI's rule; samplers against diffusers and formulas.

The velocities are random: a sampler must not care where they come from, and nothing cancels by luck.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from numpy.typing import NDArray

from trt_wan.errors import UsageError
from trt_wan.runtime.schedulers import GRIDS, SAMPLERS, Combine, Schedule, combine_fp32, schedule

F64 = NDArray[np.float64]

SHAPE = (4, 3, 6, 5)
STEPS = [1, 2, 3, 4, 6, 20]
FP32_SUMS = 1e-5


def diffusers_unipc(steps: int, shift: float = 5.0) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return scheduler


def latents(steps: int, seed: int = 0) -> tuple[F64, F64]:
    """A starting latent and one velocity per step."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE), rng.standard_normal((steps, *SHAPE))


def combine_fp64(terms: Sequence[tuple[float, F64]]) -> F64:
    return np.sum([coefficient * array for coefficient, array in terms], axis=0)


def trajectory(name: str, plan: Schedule, x: F64, velocities: F64, combine: Combine) -> list[F64]:
    sampler, out = SAMPLERS[name](plan, combine), []
    for i in range(plan.steps):
        x = sampler.step(i, x, velocities[i])
        out.append(x)
    return out


def against_diffusers(
    name: str, plan: Schedule, scheduler: UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler
) -> float:
    """Largest difference over all steps, all in float32."""
    x, velocities = (a.astype(np.float32) for a in latents(plan.steps))
    scheduler.set_begin_index(0)
    worst, theirs = 0.0, torch.from_numpy(x)
    for i, ours in enumerate(trajectory(name, plan, x, velocities, combine_fp32)):
        theirs = scheduler.step(torch.from_numpy(velocities[i]), scheduler.timesteps[i], theirs).prev_sample
        assert ours.dtype == np.float32
        worst = max(worst, float(np.abs(ours - theirs.numpy()).max()))
    return worst


def plain_unipc(sigmas: F64, x: F64, velocities: F64, first_lambda: float | None = None) -> list[F64]:
    """model_spec.md 4.2 as it stands, in float64; a first sigma of 1 needs a `first_lambda`."""
    alphas, n = 1 - sigmas, len(sigmas) - 1
    with np.errstate(divide="ignore"):
        lambdas = np.log(alphas) - np.log(sigmas)
    if first_lambda is not None:
        lambdas[0] = first_lambda
    m: list[F64] = []
    out: list[F64] = []
    previous = x
    for i in range(n):
        m.append(x - sigmas[i] * velocities[i])
        if i > 0:
            h = lambdas[i] - lambdas[i - 1]
            e = np.expm1(-h)
            jump = m[i] - m[i - 1]
            if i == 1:
                slope = 0.5 * jump
            else:
                rk = (lambdas[i - 2] - lambdas[i - 1]) / h
                p1 = e / -h - 1
                p2 = p1 / -h - 0.5
                r = np.linalg.solve(np.array([[1, 1], [rk, 1]]), np.array([p1 / e, 2 * p2 / e]))
                slope = r[0] * (m[i - 2] - m[i - 1]) / rk + r[1] * jump
            x = sigmas[i] / sigmas[i - 1] * previous - alphas[i] * e * (m[i - 1] + slope)
        previous = x
        h = lambdas[i + 1] - lambdas[i]
        e = np.expm1(-h)
        slope = np.zeros_like(x)
        if 0 < i < n - 1:
            slope = 0.5 * (m[i - 1] - m[i]) / ((lambdas[i - 1] - lambdas[i]) / h)
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * e * (m[i] + slope)
        out.append(x)
    return out


def test_printed_grids() -> None:
    """model_spec.md 4.1."""
    four = {
        "official": ([999, 937, 833, 624], [0.9998, 0.937265, 0.833055, 0.624687, 0]),
        "linear": ([1000, 937, 833, 625], [1, 0.9375, 0.833333, 0.625, 0]),
        "diffusers": ([999, 937, 833, 625], [0.999999, 0.937578, 0.833611, 0.625936, 0]),
        "simple": ([1000, 937.5, 833.333, 625], [1, 0.9375, 0.833333, 0.625, 0]),
    }
    assert four.keys() == GRIDS.keys()
    for grid, (timesteps, sigmas) in four.items():
        plan = schedule(grid, 4, 5.0)
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=0, atol=1e-3)
        np.testing.assert_allclose(plan.sigmas, sigmas, rtol=0, atol=1e-6)
        assert plan.sigmas[-1] == 0
    dpm = "1000 989 978 965 952 937 921 902 882 859 833 803 769 729 681 625 555 468 357 208"
    unipc = "999 989 978 965 952 937 920 902 882 859 833 803 768 728 681 624 555 468 356 208"
    assert schedule("linear", 20, 5.0).timesteps.tolist() == [float(t) for t in dpm.split()]
    assert schedule("official", 20, 5.0).timesteps.tolist() == [float(t) for t in unipc.split()]
    tail = schedule("diffusers", 20, 5.0).sigmas[16:20]
    np.testing.assert_allclose(tail, [0.556788, 0.470407, 0.359433, 0.211622], atol=1e-6)


def test_the_official_grid_starts_at_a_float32() -> None:
    """Thirds of a float64 0.999 would be truncated to 665 and 332."""
    assert schedule("official", 3, 1.0).timesteps.tolist() == [999, 666, 333]


@pytest.mark.parametrize("grid", ["linear", "simple"])
def test_these_start_at_one(grid: str) -> None:
    for shift in (1.0, 3.0, 5.0, 8.0):
        assert schedule(grid, 7, shift).sigmas[0] == 1.0


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [*STEPS, 7, 50, 999, 1000])
def test_grid_of_diffusers(steps: int, shift: float) -> None:
    scheduler, plan = diffusers_unipc(steps, shift), schedule("diffusers", steps, shift)
    assert plan.sigmas.tolist() == scheduler.sigmas.tolist()
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [*STEPS, 7, 30, 333, 1000])
def test_simple_grid_of_comfyui(steps: int, shift: float) -> None:
    """A float32 table of 1000 rising sigmas, read from its end at a truncated stride."""
    t = torch.arange(1, 1001) / 1000
    table = shift * t / (1 + (shift - 1) * t)
    stride = len(table) / steps
    sigmas = np.array([table[-1 - int(i * stride)].item() for i in range(steps)])
    plan = schedule("simple", steps, shift)
    np.testing.assert_allclose(plan.sigmas[:-1], sigmas, rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(plan.timesteps, 1000 * sigmas, rtol=0, atol=1.2e-4)


@pytest.mark.parametrize("steps", STEPS)
def test_unipc_of_diffusers(steps: int) -> None:
    plan = schedule("diffusers", steps, 5.0)
    assert against_diffusers("unipc", plan, diffusers_unipc(steps)) <= FP32_SUMS


@pytest.mark.parametrize("steps", STEPS)
def test_unipc_of_diffusers_on_the_official_grid(steps: int) -> None:
    plan, scheduler = schedule("official", steps, 5.0), diffusers_unipc(steps)
    scheduler.sigmas = torch.from_numpy(plan.sigmas.astype(np.float32))
    assert against_diffusers("unipc", plan, scheduler) <= FP32_SUMS


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("grid", ["linear", "simple"])
def test_euler_of_diffusers(grid: str, steps: int) -> None:
    plan, scheduler = schedule(grid, steps, 5.0), FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=GRIDS[grid].levels(steps).tolist())
    np.testing.assert_allclose(plan.sigmas, scheduler.sigmas.numpy(), rtol=0, atol=1.2e-7)
    assert against_diffusers("euler", plan, scheduler) <= FP32_SUMS


@pytest.mark.parametrize("grid", GRIDS)
def test_euler_is_its_formula(grid: str) -> None:
    plan = schedule(grid, 6, 5.0)
    x, velocities = latents(6)
    end = x + np.tensordot(np.diff(plan.sigmas), velocities, axes=1)
    np.testing.assert_allclose(trajectory("euler", plan, x, velocities, combine_fp64)[-1], end, atol=1e-12)


@pytest.mark.parametrize("steps", [*STEPS, 100])
@pytest.mark.parametrize("grid", ["official", "diffusers"])
def test_unipc_is_its_formula(grid: str, steps: int) -> None:
    """In float64 nothing hides in the rounding: the ratio form equals the published one."""
    plan = schedule(grid, steps, 5.0)
    x, velocities = latents(steps)
    ours = trajectory("unipc", plan, x, velocities, combine_fp64)
    np.testing.assert_allclose(ours, plain_unipc(plan.sigmas, x, velocities), rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("grid", ["linear", "simple"])
def test_unipc_from_pure_noise_is_the_limit(grid: str, steps: int) -> None:
    """The limit is the published form with lambda_0 = -1e12, which leaves differences of the order 1e-12.

    Sigmas near 1 will not do for that: the form approaches its limit like 1/lambda_0, and 1 - sigma_0 = 1e-15
    is only a lambda of -35. They must come closer all the same.
    """
    plan = schedule(grid, steps, 5.0)
    assert plan.sigmas[0] == 1.0
    x, velocities = latents(steps)
    ours = np.array(trajectory("unipc", plan, x, velocities, combine_fp64))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, plain_unipc(plan.sigmas, x, velocities, -1e12), rtol=0, atol=1e-10)

    gaps = []
    for below_one in (1e-3, 1e-6, 1e-9, 1e-12):
        sigmas = plan.sigmas.copy()
        sigmas[0] -= below_one
        gaps.append(np.abs(ours - plain_unipc(sigmas, x, velocities)).max())
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_one_step_lands_on_the_prediction(name: str, grid: str) -> None:
    plan = schedule(grid, 1, 5.0)
    x, velocities = latents(1)
    (end,) = trajectory(name, plan, x, velocities, combine_fp64)
    np.testing.assert_allclose(end, x - plan.sigmas[0] * velocities[0], atol=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_perfect_model_is_followed_to_its_answer(name: str, grid: str) -> None:
    """When every velocity points at one clean latent, the samplers stay on the line and end there."""
    plan = schedule(grid, 6, 5.0)
    rng = np.random.default_rng(1)
    clean, noise = rng.standard_normal((2, *SHAPE))
    line = [(1 - sigma) * clean + sigma * noise for sigma in plan.sigmas]
    x, sampler = line[0].astype(np.float32), SAMPLERS[name](plan)
    for i in range(plan.steps):
        x = sampler.step(i, x, (noise - clean).astype(np.float32))
        np.testing.assert_allclose(x, line[i + 1], rtol=0, atol=FP32_SUMS)


def test_a_sampler_serves_one_window() -> None:
    plan = schedule("simple", 4, 5.0)
    x, velocities = latents(4)
    sampler = SAMPLERS["unipc"](plan)
    sampler.step(0, x, velocities[0])
    with pytest.raises(AssertionError, match="step 1 is due, got 0"):
        sampler.step(0, x, velocities[0])


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        schedule("linear", 4, 5.0).sigmas[0] = 2.0


def test_combine_leaves_its_inputs_alone() -> None:
    a, b = np.ones(3, np.float32), np.full(3, 2.0, np.float32)
    assert combine_fp32([(1.0, a), (-0.5, b)]).tolist() == [0, 0, 0]
    assert a.tolist() == [1, 1, 1] and b.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "grid, steps, shift, message, hint",
    [
        ("karras", 4, 5.0, "no grid called 'karras'", "official, linear, diffusers, simple"),
        ("simple", 0, 5.0, "0 steps", "--steps from 1 to 1000"),
        ("simple", 1001, 5.0, "1001 steps", "--steps from 1 to 1000"),
        ("simple", 4, 0.0, "A shift of 0.0", "--shift 5"),
        ("simple", 4, -1.0, "A shift of -1.0", "--shift 5"),
        ("simple", 4, float("nan"), "A shift of nan", "--shift 5"),
        ("simple", 4, float("inf"), "A shift of inf", "--shift 5"),
        ("simple", 1000, 1e6, "the same noise level", "smaller --shift"),
        ("diffusers", 20, 1e6, "the same noise level", "smaller --shift"),
    ],
)
def test_what_cannot_be_scheduled(grid: str, steps: int, shift: float, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        schedule(grid, steps, shift)
    assert hint in caught.value.hint
