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
class RateLaw:
    """seconds = fixed + other FLOPs at one rate + attention's FLOPs at another: what a step is made of."""

    fixed_seconds: float
    seconds_per_petaflop: float  # of everything but attention
    seconds_per_attention_petaflop: float

    def seconds(self, flops: float, attention_share: float) -> float:
        other, attention = flops * (1 - attention_share), flops * attention_share
        return (
            self.fixed_seconds
            + self.seconds_per_petaflop * other / 1e15
            + self.seconds_per_attention_petaflop * attention / 1e15
        )

    @property
    def text(self) -> str:
        return (
            f"{self.fixed_seconds * 1e3:.3g} ms + {self.seconds_per_petaflop:.3g} s per PFLOP + "
            f"{self.seconds_per_attention_petaflop:.3g} s per PFLOP of attention"
        )


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


def fit_rates(points: Sequence[tuple[float, float, float]]) -> RateLaw:
    """Least squares of the relative errors over (FLOPs, attention's share, seconds), no term below 0."""
    flops, share, seconds = np.asarray(points, np.float64).T
    terms = np.stack([np.ones_like(flops), flops * (1 - share) / 1e15, flops * share / 1e15], 1)
    weighted = terms / seconds[:, None]
    kept = list(range(3))
    while True:  # a term that comes out below 0 is left out
        values, *_ = np.linalg.lstsq(weighted[:, kept], np.ones(len(seconds)), rcond=None)
        if (values >= 0).all():
            break
        del kept[int(values.argmin())]
    found = np.zeros(3)
    found[kept] = values
    return RateLaw(*(float(value) for value in found))


def bends(points: Sequence[tuple[float, float]]) -> list[Bend]:
    """Along the points in the order of their work; equal ones are left out."""
    ordered = sorted(points)
    return [
        Bend(f, g, float(np.log(t / s) / np.log(g / f)))
        for (f, s), (g, t) in zip(ordered, ordered[1:], strict=False)
        if g > f
    ]
