"""How the time of a step grows with its work: a law fitted to measured points."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RateLaw:
    """seconds = fixed + other FLOPs at one rate + attention's FLOPs at another."""

    fixed_seconds: float
    seconds_per_petaflop: float  # outside attention
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
