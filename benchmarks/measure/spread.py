"""The summary of repeated measurements: median, p10, p90 and their number, never a mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    median: float
    p10: float
    p90: float
    count: int

    @property
    def relative(self) -> float:
        """Half the distance from p10 to p90, relative to the median."""
        return (self.p90 - self.p10) / 2 / self.median if self.median else 0.0

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        assert len(values), "nothing was measured"
        p10, median, p90 = (float(np.percentile(values, p)) for p in (10, 50, 90))
        return Spread(median, p10, p90, len(values))
