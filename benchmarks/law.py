"""How the time of a step grows with its work: laws fitted to measured points, and where they bend."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """seconds = seconds_per_petaflop · petaflop^exponent. With the exponent 1 every FLOP costs the same."""

    seconds_per_petaflop: float
    exponent: float

    def seconds(self, flops: float) -> float:
        return float(self.seconds_per_petaflop * (flops / 1e15) ** self.exponent)

    @property
    def text(self) -> str:
        return f"{self.seconds_per_petaflop:.3g} s · PFLOP^{self.exponent:.3f}"


@dataclass(frozen=True)
class Bend:
    """Between two neighbouring points: the exponent there, which is the whole law's where nothing bends."""

    first: float  # FLOPs
    second: float
    exponent: float


def fit(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """Least squares of the logarithms of (FLOPs, seconds): all points count alike, whatever their size."""
    assert len({flops for flops, _ in points}) > 1, "a law needs two different amounts of work"
    flops, seconds = np.log(np.asarray(points, np.float64)).T
    exponent, offset = np.polyfit(flops - np.log(1e15), seconds, 1)
    return PowerLaw(float(np.exp(offset)), float(exponent))


def bends(points: Sequence[tuple[float, float]]) -> list[Bend]:
    """Along the points in the order of their work; equal ones are left out."""
    ordered = sorted(points)
    return [
        Bend(f, g, float(np.log(t / s) / np.log(g / f)))
        for (f, s), (g, t) in zip(ordered, ordered[1:], strict=False)
        if g > f
    ]
