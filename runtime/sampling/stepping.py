"""The parts that all samplers share: levels, the sum of latents, fresh noise, and the order of the steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from trt_wan.runtime.sampling.grids import Schedule

Latent = Any  # an array that `combine` takes: of numpy, or on the device
# [(coefficient, array), …] -> the sum of the products, a new array
Combine = Callable[[Sequence[tuple[float, Latent]]], Latent]
Draw = Callable[[], Latent]  # -> fresh noise of the latent's shape


class Sampler(Protocol):
    def step(self, i: int, latent: Latent, velocity: Latent) -> Latent:
        """Returns the next latent, from that at sigma_i and its velocity. Call in order, i = 0…N-1."""
        ...


class Stepping:
    """A sampler remembers earlier steps: make a new one for each window."""

    def __init__(self, schedule: Schedule, combine: Combine, draw: Draw) -> None:
        self.sigmas, self.last = schedule.sigmas, schedule.steps - 1
        self.combine, self.draw = combine, draw
        self._next = 0

    def begin(self, i: int) -> tuple[float, float]:
        """Call at the start of step i. Returns its sigma and the next one."""
        assert i == self._next, f"step {self._next} is due, got {i}: a sampler serves one window"
        self._next += 1
        return self.sigmas[i], self.sigmas[i + 1]

    def clean(self, sigma: float, latent: Latent, velocity: Latent) -> Latent:
        """The model's prediction of the clean latent."""
        return self.combine([(1.0, latent), (-sigma, velocity)])

    def sum(self, *terms: tuple[float, Latent]) -> Latent:
        """`combine` without the terms that are 0, whose sum with the others would still round to them."""
        return self.combine([term for term in terms if term[0] != 0])


def half_log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), infinite at both ends."""
    if sigma == 0:
        return math.inf
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def pull(lambdas: Sequence[float], s: int, t: int) -> float:
    """The step from s to t over the step from s back to s-1, in lambda: 0 where the latter is infinite. It
    carries a slope between s-1 and s on to t, and is negative.
    """
    return (lambdas[t] - lambdas[s]) / (lambdas[s - 1] - lambdas[s])
