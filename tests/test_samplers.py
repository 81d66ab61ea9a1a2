"""Samplers against diffusers, and against formulas written out slowly in float64.

Most velocities are random: a sampler must not care where they come from, and nothing cancels by luck. The
figures and fitted orders are printed with -s.
"""

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from kernels_on_cpu import CpuKernels
from numpy.typing import NDArray

from trt_wan.engines.config import TINY
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import SOURCE
from trt_wan.runtime.job import Load
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.opening import activation_memory
from trt_wan.runtime.sampling.combine import combine_fp32
from trt_wan.runtime.sampling.grids import DISTILLED, GRIDS, Schedule, schedule
from trt_wan.runtime.sampling.samplers import SAMPLERS
from trt_wan.runtime.sampling.stepping import Combine

F64 = NDArray[np.float64]
Random = tuple[Schedule, F64, F64, list[F64]]  # levels, first latent, velocities, the noise of every step

SHAPE = (4, 3, 6, 5)
STEPS = [1, 2, 3, 4, 6, 20]
SEED = 77
FP32_SUMS = 1e-5
DETERMINISTIC = [name for name, row in SAMPLERS.items() if not row.stochastic]


def diffusers_unipc(steps: int, shift: float = 5.0) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return scheduler


def levels(grid: str, steps: int, shift: float = 5.0) -> Schedule:
    """`steps` steps of a grid; the list of lightx2v has its own."""
    return schedule(grid, len(DISTILLED) if grid == "lightx2v" else steps, shift)


def latents(steps: int, seed: int = 0) -> tuple[F64, F64]:
    """A starting latent and one velocity per step."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE), rng.standard_normal((steps, *SHAPE))


def combine_fp64(terms: Sequence[tuple[float, F64]]) -> F64:
    return np.sum([coefficient * np.asarray(array, np.float64) for coefficient, array in terms], axis=0)


def trajectory(
    name: str,
    plan: Schedule,
    x: F64,
    velocities: F64,
    combine: Combine,
    draw: Callable[[], Any] | None = None,
) -> list[F64]:
    """The latent after every step."""
    generator = CpuGenerator(SEED)
    sampler, out = SAMPLERS[name].make(plan, combine, draw or (lambda: generator.randn(SHAPE))), []
    for i in range(plan.steps):
        x = sampler.step(i, x, velocities[i])
        out.append(x)
    return out


def against_diffusers(name: str, plan: Schedule, scheduler: Any) -> float:
    """Largest difference over all steps, all in float32. Noise is torch's own from SEED."""
    x, velocities = (a.astype(np.float32) for a in latents(plan.steps))
    scheduler.set_begin_index(0)
    drawing = {"generator": torch.Generator("cpu").manual_seed(SEED)} if SAMPLERS[name].stochastic else {}
    worst, theirs = 0.0, torch.from_numpy(x)
    for i, ours in enumerate(trajectory(name, plan, x, velocities, combine_fp32)):
        theirs = scheduler.step(
            torch.from_numpy(velocities[i]), scheduler.timesteps[i], theirs, **drawing
        ).prev_sample
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


@pytest.mark.parametrize("steps", STEPS)
def test_unipc_of_diffusers(steps: int) -> None:
    plan = schedule("diffusers", steps, 5.0)
    assert against_diffusers("unipc", plan, diffusers_unipc(steps)) <= FP32_SUMS


@pytest.mark.parametrize("steps", STEPS)
def test_unipc_of_diffusers_on_the_official_grid(steps: int) -> None:
    plan, scheduler = schedule("official", steps, 5.0), diffusers_unipc(steps)
    scheduler.sigmas = torch.tensor(plan.sigmas)
    assert against_diffusers("unipc", plan, scheduler) <= FP32_SUMS


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("grid", ["linear", "simple"])
def test_euler_of_diffusers(grid: str, steps: int) -> None:
    plan, scheduler = schedule(grid, steps, 5.0), FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=list(GRIDS[grid].levels(steps, 5.0)))
    np.testing.assert_allclose(plan.sigmas, scheduler.sigmas.numpy(), rtol=0, atol=1.2e-7)
    assert against_diffusers("euler", plan, scheduler) <= FP32_SUMS


@pytest.mark.parametrize("grid", GRIDS)
def test_euler_is_its_formula(grid: str) -> None:
    plan = levels(grid, 6)
    x, velocities = latents(plan.steps)
    end = x + np.tensordot(np.diff(plan.sigmas), velocities, axes=1)
    np.testing.assert_allclose(trajectory("euler", plan, x, velocities, combine_fp64)[-1], end, atol=1e-12)


@pytest.mark.parametrize("steps", [*STEPS, 100])
@pytest.mark.parametrize("grid", ["official", "diffusers"])
def test_unipc_is_its_formula(grid: str, steps: int) -> None:
    """In float64 nothing hides in the rounding: the ratio form equals the published one."""
    plan = schedule(grid, steps, 5.0)
    x, velocities = latents(steps)
    ours = trajectory("unipc", plan, x, velocities, combine_fp64)
    np.testing.assert_allclose(ours, plain_unipc(np.array(plan.sigmas), x, velocities), rtol=0, atol=1e-8)


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
    np.testing.assert_allclose(
        ours, plain_unipc(np.array(plan.sigmas), x, velocities, -1e12), rtol=0, atol=1e-10
    )

    gaps = []
    for below_one in (1e-3, 1e-6, 1e-9, 1e-12):
        sigmas = np.array(plan.sigmas)
        sigmas[0] -= below_one
        gaps.append(np.abs(ours - plain_unipc(sigmas, x, velocities)).max())
    assert gaps == sorted(gaps, reverse=True)


def on_levels(plan: Schedule, scheduler: Any) -> Any:
    """The scheduler of diffusers on the levels of a schedule."""
    scheduler.set_timesteps(plan.steps)
    scheduler.sigmas = torch.tensor(plan.sigmas)
    return scheduler


def diffusers_dpm(kind: str) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        algorithm_type=kind, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


@pytest.mark.parametrize("name, kind", [("dpm++", "dpmsolver++"), ("dpm++_sde", "sde-dpmsolver++")])
@pytest.mark.parametrize("grid", GRIDS)
def test_dpm_of_diffusers(grid: str, name: str, kind: str) -> None:
    """Their float32 loses digits of 1 - sigma where a level is almost 1."""
    plans = [levels(grid, steps) for steps in STEPS]
    worst = max(against_diffusers(name, plan, on_levels(plan, diffusers_dpm(kind))) for plan in plans)
    print(f"{name} on {grid}: {worst:.1e} from diffusers")
    assert worst <= FP32_SUMS


@pytest.mark.parametrize("grid", GRIDS)
def test_lcm_of_diffusers(grid: str) -> None:
    plans = [levels(grid, steps) for steps in STEPS]
    worst = max(against_diffusers("lcm", plan, on_levels(plan, FlowMatchLCMScheduler())) for plan in plans)
    print(f"lcm on {grid}: {worst:.1e} from diffusers")
    assert worst <= FP32_SUMS


@pytest.mark.parametrize(
    "name, scheduler",
    [
        ("unipc", lambda: diffusers_unipc(1)),
        ("dpm++", lambda: diffusers_dpm("dpmsolver++")),
        ("dpm++_sde", lambda: diffusers_dpm("sde-dpmsolver++")),
        ("lcm", FlowMatchLCMScheduler),
    ],
)
def test_a_part_of_the_steps_of_diffusers(name: str, scheduler: Callable[[], Any]) -> None:
    """As in ComfyUI-WanVideoWrapper, the scheduler gets the levels of the part: its last step is special."""
    for start, end in ((0, 4), (2, 6), (3, 7), (5, 6)):
        part = schedule("kijai", 7, 5.0).part(start, end)
        assert against_diffusers(name, part, on_levels(part, scheduler())) <= FP32_SUMS


@pytest.mark.parametrize("name, draws", [("dpm++_sde", 6), ("lcm", 6), ("er_sde", 5), ("dpm++", 0)])
def test_the_generator_goes_on_as_that_of_the_origin(name: str, draws: int) -> None:
    """diffusers draws in the last step too, ComfyUI's er_sde does not."""
    generator, other = CpuGenerator(SEED), CpuGenerator(SEED)
    plan = schedule("simple", 6, 5.0)
    trajectory(name, plan, *latents(6), combine_fp64, lambda: generator.randn(SHAPE))
    for _ in range(draws):
        other.randn(SHAPE)
    assert generator.state() == other.state()


def plain_dpm(plan: Random, noisy: bool) -> F64:
    """DPM-Solver++(2M), midpoint, in lambda and with e^h as published; the first level must be below 1."""
    levels, x, velocities, noise = plan
    s, n = np.array(levels.sigmas), levels.steps
    lam = np.log(1 - s[:-1]) - np.log(s[:-1])
    m: list[F64] = []
    for i in range(n):
        m.append(x - s[i] * velocities[i])
        h = lam[i + 1] - lam[i] if i < n - 1 else np.inf
        slope = (m[i] - m[i - 1]) * h / (lam[i] - lam[i - 1]) if 0 < i < n - 1 else 0.0
        target = m[i] + 0.5 * slope
        if noisy:
            x = s[i + 1] / s[i] * np.exp(-h) * x + (1 - s[i + 1]) * (1 - np.exp(-2 * h)) * target
            x = x + s[i + 1] * np.sqrt(1 - np.exp(-2 * h)) * noise[i]
        else:
            x = s[i + 1] / s[i] * x + (1 - s[i + 1]) * (1 - np.exp(-h)) * target
    return x


def plain_res(plan: Random) -> F64:
    levels, x, velocities, _ = plan
    s = levels.sigmas
    before = x
    for i in range(levels.steps):
        m = x - s[i] * velocities[i]
        if i == 0 or s[i + 1] == 0:
            x = x + (s[i + 1] - s[i]) * (x - m) / s[i]
        else:
            t_before, t, t_next = (-np.log(s[k]) for k in (i - 1, i, i + 1))
            h, c = t_next - t, (t_before - t) / (t_next - t)
            phi1 = (np.exp(-h) - 1) / -h
            phi2 = (phi1 - 1) / -h
            x = np.exp(-h) * x + h * ((phi1 - phi2 / c) * m + phi2 / c * before)
        before = m
    return x


def plain_er_sde(plan: Random, first: float | None = None) -> F64:
    """ComfyUI's form, derivatives and sums of 200 points as they stand; `first` stands for a level of 1."""
    levels, x, velocities, noise = plan
    s = np.array(levels.sigmas)
    s[0] = s[0] if first is None else first
    lam = s / (1 - s)

    def scale(at: Any) -> Any:
        return at * (np.exp(at**0.3) + 10)

    m: list[F64] = []
    d: list[F64] = []
    for i in range(levels.steps):
        m.append(x - s[i] * velocities[i])
        if s[i + 1] == 0:
            return m[i]
        alpha, r, dt = 1 - s[i + 1], scale(lam[i + 1]) / scale(lam[i]), lam[i + 1] - lam[i]
        x = alpha / (1 - s[i]) * r * x + alpha * (1 - r) * m[i]
        points = lam[i + 1] - dt / 200 * np.arange(200)
        if i:
            d.append((m[i] - m[i - 1]) / (lam[i] - lam[i - 1]))
            x = x + alpha * (dt + np.sum(1 / scale(points)) * -dt / 200 * scale(lam[i + 1])) * d[-1]
        if i > 1:
            u = (d[-1] - d[-2]) / ((lam[i] - lam[i - 2]) / 2)
            area = np.sum((points - lam[i]) / scale(points)) * -dt / 200
            x = x + alpha * (dt**2 / 2 + area * scale(lam[i + 1])) * u
        x = x + alpha * np.sqrt(lam[i + 1] ** 2 - lam[i] ** 2 * r**2) * noise[i]
    raise AssertionError("the last level is 0")


def plain_sa(plan: Random) -> F64:
    levels, x, velocities, _ = plan
    many, smooth = levels.steps > 8, None
    for i, (s, after) in enumerate(zip(levels.sigmas[:-1], levels.sigmas[1:], strict=True)):
        v = velocities[i]
        order = min(i + 1, 3 if many and 0.15 < s <= 0.7 else 2)
        if order == 2:
            v = 1.5 * velocities[i] - 0.5 * velocities[i - 1]
        if order == 3:
            v = (23 * velocities[i] - 16 * velocities[i - 1] + 5 * velocities[i - 2]) / 12
        dt = after - s
        if many and s < 0.15:
            v = v if smooth is None else 0.8 * smooth + 0.2 * v
            dt *= 0.5 + 0.5 * s / 0.15
        smooth = v
        to = x + v * dt
        if many and s < 0.05 and i >= 2:
            mean = x + velocities[i - 2 : i + 1].mean(axis=0) * dt
            to = s / 0.05 * to + (1 - s / 0.05) * mean
        x = to
    return x


FORMULAS: dict[str, Callable[[Random], F64]] = {
    "dpm++": lambda plan: plain_dpm(plan, noisy=False),
    "dpm++_sde": lambda plan: plain_dpm(plan, noisy=True),
    "res_multistep": plain_res,
    "er_sde": plain_er_sde,
    "sa_ode_stable": plain_sa,
}


def random_plan(plan: Schedule) -> Random:
    generator = CpuGenerator(SEED)

    def draw() -> F64:
        return generator.randn(SHAPE).astype(np.float64)

    return (plan, *latents(plan.steps), [draw() for _ in range(plan.steps)])


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("grid", ["official", "diffusers", "kijai"])
def test_the_formulas(grid: str, name: str) -> None:
    """On grids below 1, in float64: other forms of the same formula."""
    gaps = []
    for steps in (1, 2, 3, 6, 9, 20, 60):
        plan = random_plan(levels(grid, steps))
        ours = trajectory(name, *plan[:3], combine_fp64)[-1]
        gaps.append(float(np.abs(ours - FORMULAS[name](plan)).max()))
    print(f"{name} on {grid}: {max(gaps):.1e} from its formula")
    assert max(gaps) <= 1e-9


@pytest.mark.parametrize("name", ["res_multistep", "sa_ode_stable"])
@pytest.mark.parametrize("grid", ["linear", "simple", "normal", "beta"])
def test_the_formulas_from_pure_noise(grid: str, name: str) -> None:
    for steps in (1, 2, 3, 6, 9, 20):
        plan = random_plan(levels(grid, steps))
        ours = trajectory(name, *plan[:3], combine_fp64)[-1]
        np.testing.assert_allclose(ours, FORMULAS[name](plan), rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_er_sde_from_pure_noise_is_near_comfyuis(steps: int) -> None:
    """ComfyUI puts the shifted 1 - 1e-4 for a first level of 1; the closer to 1, the closer to ours."""
    plan = random_plan(schedule("simple", steps, 5.0))
    ours = trajectory("er_sde", *plan[:3], combine_fp64)[-1]
    gaps = []
    for below in (1e-4, 1e-5, 1e-6, 1e-7):
        first = 5 * (1 - below) / (1 + 4 * (1 - below))
        gaps.append(float(np.abs(ours - plain_er_sde(plan, first)).max()))
    print(
        f"er_sde, {steps} steps: {gaps[0]:.1e} from ComfyUI's, {gaps[-1]:.1e} with a first level nearer to 1"
    )
    assert gaps == sorted(gaps, reverse=True) and gaps[0] < 2e-3 and gaps[-1] < 2e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_perfect_model_is_followed_to_its_answer(name: str, grid: str) -> None:
    """When every velocity points at one clean latent, the samplers stay on the line and end there."""
    plan = levels(grid, 6)
    rng = np.random.default_rng(1)
    clean, noise = rng.standard_normal((2, *SHAPE))
    line = [(1 - sigma) * clean + sigma * noise for sigma in plan.sigmas]
    x, sampler = line[0].astype(np.float32), SAMPLERS[name].make(plan, combine_fp32, lambda: noise)
    for i in range(plan.steps):
        x = sampler.step(i, x, (noise - clean).astype(np.float32))
        np.testing.assert_allclose(x, line[i + 1], rtol=0, atol=FP32_SUMS)


def test_a_sampler_serves_one_window() -> None:
    plan = schedule("simple", 4, 5.0)
    x, velocities = latents(4)
    sampler = SAMPLERS["unipc"].make(plan, combine_fp64, lambda: x)
    sampler.step(0, x, velocities[0])
    with pytest.raises(AssertionError, match="step 1 is due, got 0"):
        sampler.step(0, x, velocities[0])


CLEAN_AT_THE_END = [name for name in SAMPLERS if name != "sa_ode_stable"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_sampler_on_every_grid(grid: str, name: str) -> None:
    """Finite, and at level 0 exactly the last clean prediction."""
    for steps in (1, 2, 3, 30):
        plan = levels(grid, steps)
        x, velocities = (a.astype(np.float32) for a in latents(plan.steps))
        *before, end = trajectory(name, plan, x, velocities, combine_fp32)
        assert all(np.isfinite(one).all() for one in (*before, end))
        last = before[-1] if before else x
        if name in CLEAN_AT_THE_END:
            clean = combine_fp32([(1.0, last), (-plan.sigmas[-2], velocities[-1])])
            np.testing.assert_array_equal(end, clean)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_part_of_the_steps_ends_with_noise(name: str) -> None:
    """A perfect model's latent is followed to the level where the steps end, from a level in the middle."""
    plan = schedule("simple", 7, 5.0).part(2, 6)
    clean, noise = np.random.default_rng(1).standard_normal((2, *SHAPE))
    start = (1 - plan.sigmas[0]) * clean + plan.sigmas[0] * noise
    end = trajectory(name, plan, start, np.array([noise - clean] * 4), combine_fp64, lambda: noise)[-1]
    if SAMPLERS[name].stochastic and name != "lcm":  # parts of one noise add up as those of many do not
        assert np.isfinite(end).all()
        return
    np.testing.assert_allclose(end, (1 - plan.sigmas[-1]) * clean + plan.sigmas[-1] * noise, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.stochastic])
def test_a_stochastic_step_keeps_the_level(name: str) -> None:
    """A latent around a known clean one has the mean and the deviation of its level, step by step."""
    plan = schedule("official", 6, 5.0)
    rng = np.random.default_rng(2)
    clean, x = 0.7, rng.standard_normal(400_000)
    x = (1 - plan.sigmas[0]) * clean + plan.sigmas[0] * x
    sampler = SAMPLERS[name].make(plan, combine_fp64, lambda: rng.standard_normal(x.shape))
    for i, after in enumerate(plan.sigmas[1:]):
        x = sampler.step(i, x, (x - clean) / plan.sigmas[i])
        assert abs(x.mean() - (1 - after) * clean) < 6e-3 and abs(x.std() - after) < 4e-3


# --- Convergence -------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
MEAN, DEVIATION, PLACE = RNG.standard_normal(50), RNG.uniform(0.3, 1.5, 50), RNG.standard_normal(50)


def exact(sigma: float) -> F64:
    """The path of a latent whose clean ones are normally distributed, in closed form."""
    spread: F64 = np.sqrt((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)
    return (1 - sigma) * MEAN + spread * PLACE


def field(x: F64, sigma: float) -> F64:
    """The velocity of an ideal model for them."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    away: F64 = x - (1 - sigma) * MEAN
    return -MEAN + away * (sigma - (1 - sigma) * DEVIATION**2) / variance


def order(name: str, made: Callable[[int], Sequence[float]]) -> float:
    """The slope of the error's logarithm over that of the steps, 10 to 160."""
    counts, errors = [10, 20, 40, 80, 160], []
    for steps in counts:
        plan = Schedule(tuple(made(steps)), (0.0,) * steps)
        sampler, x = SAMPLERS[name].make(plan, combine_fp64, lambda: np.zeros(50)), exact(plan.sigmas[0])
        for i in range(steps):
            x = sampler.step(i, x, field(x, plan.sigmas[i]))
        errors.append(float(np.abs(x - exact(plan.sigmas[-1])).max()))
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name: str) -> None:
    """From level 0.95 to 0.2, by equal steps and by shifted ones."""

    def equal(steps: int) -> Sequence[float]:
        return np.linspace(0.95, 0.2, steps + 1).tolist()

    def by_shift(steps: int) -> Sequence[float]:
        u = np.linspace(0.95 / (5 - 4 * 0.95), 0.2 / (5 - 4 * 0.2), steps + 1)
        return (5 * u / (1 + 4 * u)).tolist()

    found = [order(name, made) for made in (equal, by_shift)]
    whole = order(name, lambda steps: schedule("linear", steps, 5.0).sigmas)
    print(f"{name}: order {found[0]:.2f}, {found[1]:.2f} shifted; from 1 to 0 {whole:.2f}")
    assert np.abs(np.array(found) - SAMPLERS[name].order).max() < 0.3
    # To 0 the last steps stay long in lambda, however many there are.
    assert whole > 0.9 if name in CLEAN_AT_THE_END else whole < 0.3


# --- On the GPU --------------------------------------------------------------------------------------------


class Placed:
    """An array of the made-up device."""

    def __init__(self, host: NDArray[np.float32]) -> None:
        self.host = np.ascontiguousarray(host, np.float32)
        self.shape, self.size, self.address = host.shape, host.size, self.host.ctypes.data


@pytest.fixture(scope="module")
def gpu_combine(tmp_path_factory: pytest.TempPathFactory) -> Combine:
    """`Gpu.combine` with its kernel's own source, run by the CPU."""
    library = CpuKernels(SOURCE.partition("// Normal")[0], tmp_path_factory.mktemp("combine"))._library
    for name in ("blockDim", "gridDim"):
        ctypes.c_uint.in_dll(library, name).value = 1
    pointer, floats = ctypes.c_void_p, [ctypes.c_float] * 6
    library.combine.argtypes = [pointer, ctypes.c_int64, ctypes.c_int, *[pointer] * 6, *floats]

    def launch(stream: None, name: str, size: int, *arguments: Any) -> None:
        library.combine(*(a.item() if isinstance(a, np.generic) else a for a in arguments))

    gpu = SimpleNamespace(
        stream=None,
        upload=lambda array: array if isinstance(array, Placed) else Placed(array),
        empty=lambda shape, dtype: Placed(np.empty(shape, dtype)),
        _launch=launch,
    )
    return lambda terms: Gpu.combine(gpu, terms)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_gpus_sums_are_those_of_numpy(gpu_combine: Combine, name: str) -> None:
    """Bit for bit, noise uploaded from the host; no step has more terms than the kernel takes."""
    for grid, steps in (("official", 30), ("simple", 4)):
        plan = schedule(grid, steps, 5.0)
        x, velocities = (a.astype(np.float32) for a in latents(steps))
        here = trajectory(name, plan, x, velocities, combine_fp32)
        there: Any = trajectory(name, plan, x, velocities, gpu_combine)
        for ours, placed in zip(here, there, strict=True):
            np.testing.assert_array_equal(placed.host.view(np.uint32), ours.view(np.uint32))


def test_no_sampler_needs_more_memory_than_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one window of 10 steps, after which every sampler has its full memory."""
    monkeypatch.setattr(activation_memory, "STEPS", 10)
    monkeypatch.setattr(activation_memory, "WINDOWS", 1)
    peaks = {}
    for name in SAMPLERS:
        executor = activation_memory._Rehearsal()
        model = Model(TINY, Plan(64, 48, 13), executor, {})
        activation_memory._rehearse(model, Load(10), None, sampler=name)
        peaks[name] = executor.arena.peak
    assert max(peaks.values()) == peaks["unipc"]


def test_combine_leaves_its_inputs_alone() -> None:
    a, b = np.ones(3, np.float32), np.full(3, 2.0, np.float32)
    assert combine_fp32([(1.0, a), (-0.5, b)]).tolist() == [0, 0, 0]
    assert a.tolist() == [1, 1, 1] and b.tolist() == [2, 2, 2]
