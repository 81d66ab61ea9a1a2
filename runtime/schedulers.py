"""Noise levels and the samplers that step through them (flow matching, model_spec.md 4).

A latent at level sigma is x = (1 - sigma)·clean + sigma·noise; the model predicts the velocity noise - clean,
so that clean = x - sigma·velocity. Levels fall from (almost) 1 to exactly 0 in N steps. A *grid* chooses the
levels and the timesteps. A *sampler* turns (latent, velocity) of one level into the next latent.

A sampler computes coefficients on the host in float64 and asks `combine` for linear combinations of latents.
By default these are numpy arrays in float32; with an executor's `combine` they stay on the device. A sampler
remembers earlier steps: make a new one for each window.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import UsageError, shown

F64 = NDArray[np.float64]

Latent = Any  # an array that `combine` takes: of numpy, or on the device
# [(coefficient, array), …] -> the sum of the products, a new array
Combine = Callable[[Sequence[tuple[float, Latent]]], Latent]

MODEL_TIMES = 1000  # the model gets sigma on a scale of 0…1000
BELOW_ONE = 1e-6


@dataclass(frozen=True, eq=False)
class Schedule:
    """`sigmas` [N+1], falling, the last 0; `timesteps` [N], inputs of the model. float64, read-only."""

    sigmas: F64
    timesteps: F64

    def __post_init__(self) -> None:
        self.sigmas.flags.writeable = False
        self.timesteps.flags.writeable = False

    @property
    def steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class Grid:
    """`levels(steps)` are the sigmas before the shift; `starts_below_one` lowers a first one of 1 by 1e-6."""

    levels: Callable[[int], F64]
    integer_timesteps: bool = True
    starts_below_one: bool = False


def _falling(first: float, last: float) -> Callable[[int], F64]:
    return lambda steps: np.linspace(first, last, steps + 1)[:-1]


def _every_nth(steps: int) -> F64:
    """Every (1000/steps)-th of 1, 0.999, … 0.001, positions truncated."""
    return np.array([(MODEL_TIMES - int(i * (MODEL_TIMES / steps))) / MODEL_TIMES for i in range(steps)])


GRIDS = {
    # FlowUniPC of the official code; its 0.999 has been through a float32 tensor and is 1.3e-8 larger
    "official": Grid(_falling(float(np.float32(0.999)), 0.0)),
    # the official code's grid for DPM++
    "linear": Grid(_falling(1.0, 0.0)),
    # UniPCMultistepScheduler with use_flow_sigmas, diffusers 0.40 to 0.42
    "diffusers": Grid(_falling(1.0, 1 / MODEL_TIMES), starts_below_one=True),
    # ComfyUI's "simple"
    "simple": Grid(_every_nth, integer_timesteps=False),
}


def schedule(grid: str, steps: int, shift: float) -> Schedule:
    """The levels of `grid`, moved towards noise: sigma -> shift·sigma / (1 + (shift-1)·sigma).

    Raises UsageError for an unknown grid, steps outside 1…1000, or a shift (officially 5) that is not a
    positive number or makes two levels equal.
    """
    _check(grid, steps, shift)
    row = GRIDS[grid]
    levels = row.levels(steps)
    levels = shift * levels / (1 + (shift - 1) * levels)
    if row.starts_below_one and abs(levels[0] - 1) < BELOW_ONE:
        levels[0] -= BELOW_ONE
    timesteps = MODEL_TIMES * levels
    # The origins of all four grids keep sigmas in float32. This matters near 1, where UniPC takes the
    # logarithm of 1 - sigma: 1 - float32(0.999999) is 1.013e-6.
    sigmas = np.append(levels, 0.0).astype(np.float32).astype(np.float64)
    if not (np.diff(sigmas) < 0).all():
        raise UsageError(
            f"A shift of {shift:g} presses two of {steps} steps into the same noise level.",
            "Use a smaller --shift (5 is the official one) or fewer --steps.",
        )
    return Schedule(sigmas, np.trunc(timesteps) if row.integer_timesteps else timesteps)


def _check(grid: str, steps: int, shift: float) -> None:
    if grid not in GRIDS:
        raise UsageError(f"There is no grid called {grid!r}.", f"Use one of {', '.join(GRIDS)}.")
    if not 1 <= steps <= MODEL_TIMES:
        raise UsageError(
            f"{shown(steps)} steps are not possible: the model knows {MODEL_TIMES} noise levels.",
            f"Use --steps from 1 to {MODEL_TIMES}: 20 without, 4 to 6 with a distill LoRA.",
        )
    if not (math.isfinite(shift) and shift > 0):
        raise UsageError(f"A shift of {shift} is not a positive number.", "Use --shift 5, the official one.")


def combine_fp32(terms: Sequence[tuple[float, Latent]]) -> NDArray[np.float32]:
    """The sum of coefficient·array, float32, added in the order given."""
    (coefficient, array), *rest = terms
    total: NDArray[np.float32] = np.multiply(array, coefficient, dtype=np.float32)
    for coefficient, array in rest:
        total += np.multiply(array, coefficient, dtype=np.float32)
    return total


class Sampler(Protocol):
    def __init__(self, schedule: Schedule, combine: Combine = combine_fp32) -> None: ...

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        """Returns the next latent, from that at sigma_i and its velocity. Call in order, i = 0…N-1."""
        ...


class Euler:
    """x += (sigma_{i+1} - sigma_i)·velocity."""

    def __init__(self, schedule: Schedule, combine: Combine = combine_fp32) -> None:
        self._sigmas: list[float] = schedule.sigmas.tolist()
        self._combine = combine

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        return self._combine([(1.0, latent), (self._sigmas[i + 1] - self._sigmas[i], velocity)])


class UniPC:
    """UniPC (Zhao et al. 2023), B2(h), order 2 with corrector, on the clean latents m_i of the model.

    With a = 1 - sigma and lambda = log(a/sigma), the published form multiplies by a·expm1(-h) and divides by
    differences of lambda, which is infinite at both ends. For flow matching, -a_t·expm1(-h) from s to t is
    1 - sigma_t/sigma_s, finite everywhere. A slope of m over an infinite distance is 0 (`_pull`).
    """

    def __init__(self, schedule: Schedule, combine: Combine = combine_fp32) -> None:
        self._sigmas: list[float] = schedule.sigmas.tolist()
        self._lambdas = [_lambda(sigma) for sigma in self._sigmas]
        self._combine = combine
        self._next = 0
        self._latent: Latent = None  # at the last step's sigma, corrected
        self._clean: list[Latent] = []  # m of the last three steps, oldest first

    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        assert i == self._next, f"step {self._next} is due, got {i}: a sampler serves one window"
        self._next += 1
        # From the latent the model saw, not from the corrected one.
        clean = self._combine([(1.0, latent), (-self._sigmas[i], velocity)])
        self._clean = [*self._clean[-2:], clean]
        self._latent = self._correct(i) if i else latent
        return self._predict(i)

    def _predict(self, i: int) -> Latent:
        ratio = self._sigmas[i + 1] / self._sigmas[i]
        gain = 1 - ratio
        if i == 0 or self._sigmas[i + 1] == 0:
            return self._combine([(ratio, self._latent), (gain, self._clean[-1])])
        half = gain * 0.5 * self._pull(i, i + 1)
        return self._combine([(ratio, self._latent), (gain - half, self._clean[-1]), (half, self._clean[-2])])

    def _correct(self, i: int) -> Latent:
        """Repeats the step from i-1 to i with m_i, which is known now."""
        ratio = self._sigmas[i] / self._sigmas[i - 1]
        gain = 1 - ratio
        if i == 1:
            m0, m1 = self._clean
            return self._combine([(ratio, self._latent), (gain * 0.5, m0), (gain * 0.5, m1)])
        old, new = self._corrector_weights(i)
        m0, m1, m2 = self._clean
        return self._combine(
            [(ratio, self._latent), (gain * old, m0), (gain * (1 - old - new), m1), (gain * new, m2)]
        )

    def _corrector_weights(self, i: int) -> tuple[float, float]:
        """Weights of m_{i-2} - m_{i-1} and m_i - m_{i-1}: the 2x2 system of model_spec.md 4.2, solved."""
        h = self._lambdas[i] - self._lambdas[i - 1]
        e = math.expm1(-h)
        phi = -e / h - 1
        b1, b2 = phi / e, 2 * (-phi / h - 0.5) / e
        pull = self._pull(i - 1, i)
        r0 = (b2 - b1) * pull / (1 - pull)
        return r0 * pull, b1 - r0

    def _pull(self, s: int, t: int) -> float:
        """1/rk: the step s to t over the step s back to s-1, in lambda; 0 where the latter is infinite."""
        return (self._lambdas[t] - self._lambdas[s]) / (self._lambdas[s - 1] - self._lambdas[s])


def _lambda(sigma: float) -> float:
    if sigma == 0:
        return math.inf
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


SAMPLERS: dict[str, type[Sampler]] = {"euler": Euler, "unipc": UniPC}
