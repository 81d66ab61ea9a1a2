"""Grids: noise levels and timesteps by name, or a list of levels of one's own."""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from trt_wan.errors import UsageError, shown

MODEL_TIMES = 1000  # the model gets sigma on a scale of 0…1000
BELOW_ONE = 1e-6
BETA = 0.6  # both parameters of the beta distribution (arXiv:2407.12173)
DISTILLED = (1000, 750, 500, 250)  # denoising_step_list of lightx2v's distilled models


@dataclass(frozen=True)
class Schedule:
    """`sigmas`: N+1 falling levels, the last 0 unless the steps end earlier; `timesteps`: N inputs of the
    model.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def part(self, start: int, end: int) -> "Schedule":
        """Steps `start` to `end`, the latter not included."""
        return Schedule(self.sigmas[start : end + 1], self.timesteps[start:end])


Levels = Callable[[int, float], Sequence[float]]  # steps, shift -> sigmas before the shift


@dataclass(frozen=True)
class Grid:
    """`starts_below_one` lowers a first sigma of 1 by 1e-6."""

    levels: Levels
    about: str
    integer_timesteps: bool = True
    starts_below_one: bool = False


def shifted(level: float, shift: float) -> float:
    """NaN for a shift too small to compute with."""
    below = 1 + (shift - 1) * level
    return shift * level / below if below else math.nan


def float32(number: float) -> float:
    """The closest number of single precision, which may be infinite."""
    try:
        single: float = struct.unpack("f", struct.pack("f", number))[0]
    except OverflowError:
        return math.copysign(math.inf, number)
    return single


def _falling(first: float, last: float) -> Levels:
    return lambda steps, shift: _spaced(first, last, steps + 1)[:-1]


def _spaced(first: float, last: float, count: int) -> list[float]:
    """numpy.linspace, to the last bit."""
    step = (last - first) / (count - 1) if count > 1 else 0.0
    return [*(first + i * step for i in range(count - 1)), last if count > 1 else first]


def _kijai(steps: int, shift: float) -> Sequence[float]:
    """From the shifted 0.999 to 0: the shift acts twice on the first level, in float32 at first."""
    top = float32(0.999)
    first = float32(float32(shift * top) / float32(1 + float32((shift - 1) * top)))
    return _spaced(first, 0.0, steps + 1)[:-1]


def _every_nth(steps: int, shift: float) -> Sequence[float]:
    """Every (1000/steps)-th of 1, 0.999, … 0.001, positions truncated."""
    return [(MODEL_TIMES - int(i * (MODEL_TIMES / steps))) / MODEL_TIMES for i in range(steps)]


def _normal(steps: int, shift: float) -> Sequence[float]:
    """From 1 to the shifted 0.001, both included: the shift acts twice on the last level."""
    return _spaced(1.0, shifted(1 / MODEL_TIMES, shift), steps)


def _sgm_uniform(steps: int, shift: float) -> Sequence[float]:
    return _spaced(1.0, shifted(1 / MODEL_TIMES, shift), steps + 1)[:-1]


def _beta(steps: int, shift: float) -> Sequence[float]:
    """Quantiles of the beta distribution, on the levels 0.001, 0.002, … 1. Steps on one level count once."""
    places = (round(beta_quantile(1 - i * (1 / steps)) * (MODEL_TIMES - 1)) for i in range(steps))
    return [(place + 1) / MODEL_TIMES for place in dict.fromkeys(places)]


def _distilled(steps: int, shift: float) -> Sequence[float]:
    if steps != len(DISTILLED):
        raise UsageError(
            f"The grid lightx2v has {len(DISTILLED)} steps, not {shown(steps)}.",
            f"Use --steps {len(DISTILLED)}, or --grid simple, which has the same levels there.",
        )
    return [time / MODEL_TIMES for time in DISTILLED]


GRIDS = {
    # its 0.999 has been through a float32 tensor and is 1.3e-8 larger
    "official": Grid(_falling(float32(0.999), 0.0), "the official code's UniPC"),
    "linear": Grid(_falling(1.0, 0.0), "the official code's DPM++"),
    # UniPCMultistepScheduler with use_flow_sigmas, diffusers 0.40 to 0.42
    "diffusers": Grid(_falling(1.0, 1 / MODEL_TIMES), "diffusers' UniPC", starts_below_one=True),
    "kijai": Grid(_kijai, "UniPC and DPM++ of ComfyUI-WanVideoWrapper"),
    "simple": Grid(_every_nth, "ComfyUI", integer_timesteps=False),
    "normal": Grid(_normal, "ComfyUI, and diffusers' Euler", integer_timesteps=False),
    "sgm_uniform": Grid(_sgm_uniform, "ComfyUI", integer_timesteps=False),
    "beta": Grid(_beta, "ComfyUI", integer_timesteps=False),
    "lightx2v": Grid(_distilled, "4-step distilled models", integer_timesteps=False),
}


@lru_cache(maxsize=16)  # a job asks for it at every prompt of a window
def schedule(grid: str, steps: int, shift: float) -> Schedule:
    """The levels of `grid`, moved towards noise: sigma -> shift·sigma / (1 + (shift-1)·sigma).

    On the grid beta, steps that fall on one level are one step. Raises UsageError for an unknown grid, steps
    outside 1…1000, or a shift (officially 5) that is not a positive number or makes two levels equal.
    """
    _check(grid, steps, shift)
    row = GRIDS[grid]
    levels = [shifted(level, shift) for level in row.levels(steps, shift)]
    if row.starts_below_one and abs(levels[0] - 1) < BELOW_ONE:
        levels[0] -= BELOW_ONE
    # The origins of all grids keep sigmas in float32. This matters near 1, where UniPC takes the logarithm of
    # 1 - sigma: 1 - float32(0.999999) is 1.013e-6.
    sigmas = (*map(float32, levels), 0.0)
    if not _falls(sigmas):
        raise UsageError(
            f"A shift of {shift:g} presses two of {steps} steps into the same noise level.",
            "Use a smaller --shift (5 is the official one) or fewer --steps.",
        )
    times = [MODEL_TIMES * level for level in levels]
    return Schedule(
        sigmas, tuple(float(math.trunc(t)) for t in times) if row.integer_timesteps else tuple(times)
    )


def schedule_of(levels: Sequence[float]) -> Schedule:
    """Levels as they are given; a 0 at the end may be left out. Timesteps are truncated, as in
    ComfyUI-WanVideoWrapper. Raises UsageError unless they fall, from at most 1 to more than 0.
    """
    given = levels[:-1] if levels and levels[-1] == 0 else levels
    sigmas = (*map(float32, given), 0.0)
    if not (1 <= len(given) <= MODEL_TIMES and sigmas[0] <= 1 and _falls(sigmas)):
        raise UsageError(
            f"The noise levels {shown(', '.join(f'{level:g}' for level in levels)) or 'of an empty list'} do "
            "not fall from at most 1 towards 0.",
            "Give each level once, the largest first: --sigmas 1,0.94,0.83,0.62,0",
        )
    return Schedule(sigmas, tuple(float(math.trunc(float32(MODEL_TIMES * s))) for s in sigmas[:-1]))


def beta_quantile(p: float, a: float = BETA) -> float:
    """The x up to which the beta distribution with both parameters `a` < 1 has the share `p`.

    Newton's method in u = x^a, where the share is almost linear and convex: it falls towards the root.
    """
    if p >= 0.5:
        return 0.5 if p == 0.5 else 1 - beta_quantile(1 - p, a)
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    u = p * a * whole
    for _ in range(20):
        x = u ** (1 / a)
        gap = (_share(x, a) / whole - p) * a * whole * (1 - x) ** (1 - a)
        u -= gap
        if abs(gap) <= 1e-16 * u:
            break
    return float(u ** (1 / a))


def _share(x: float, a: float) -> float:
    """The incomplete beta function B_x(a, a), by its power series; x is at most 1/2 or little more."""
    total, factor = 0.0, 1.0
    for k in range(200):
        total += (term := factor / (a + k))
        if term < 1e-18:
            break
        factor *= x * (k + 1 - a) / (k + 1)
    return float(total * x**a)


def _falls(sigmas: Sequence[float]) -> bool:
    return all(high > low for high, low in pairwise(sigmas))


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
