"""A benchmark several times in a row: how far its headline figures spread."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from trt_wan.benchmarks.report.result import Result
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet

JOBS = 5  # in a run: the host is shared, and the median of three still varies with it
REPEAT_SCHEMA = "trt-wan-bench-repeat/1"
LARGEST_SPREAD = 0.03  # between runs of a headline figure


@dataclass(frozen=True)
class Repeated:
    """A figure over the runs. The spread is the whole range as a part of the median."""

    name: str
    values: list[float]
    median: float
    spread: float

    @property
    def steady(self) -> bool:
        return self.spread <= LARGEST_SPREAD


@dataclass(frozen=True)
class Repeats:
    """Several results of the same benchmark, as one report."""

    runs: Sequence[Result]
    stem: ClassVar[str] = Result.stem

    @property
    def headlines(self) -> list[Repeated]:
        """The headline figures that every run has."""
        return _over_runs([run.headlines() for run in self.runs])

    @property
    def parts(self) -> list[Repeated]:
        """The parts of starts and jobs: where a spread comes from. No part has its own limit."""
        return _over_runs([run.parts() for run in self.runs])

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": REPEAT_SCHEMA,
            "repeatability": [{**asdict(row), "steady": row.steady} for row in self.headlines],
            "parts": [asdict(row) for row in self.parts],
            "runs": [run.to_dict() for run in self.runs],
        }

    def sheets(self) -> list[Sheet | str]:
        def rows(figures: Sequence[Repeated], limit: float) -> list[Row]:
            found: list[Row] = []
            for row in figures:
                shown = "GB" if row.name.endswith("memory") else "s"
                values = ", ".join(Figure(value, shown).text for value in row.values)
                over = "" if row.spread <= limit else f"over {limit:.0%}"
                found.append((row.name, Figure(row.median, shown), values, Figure(row.spread, "%"), over))
            return found

        heads = ("median", "runs", "spread", "")
        title = f"Repeatability: {self.runs[-1].title} (spread: the whole range over the median)"
        return [
            Sheet("repeated", title, heads, rows(self.headlines, LARGEST_SPREAD)),
            Sheet(
                "part", "Parts of a start and a job, warm (medians)", heads, rows(self.parts, float("inf"))
            ),
        ]

    def draw(self) -> Mapping[str, Any]:
        """The plots of the last run."""
        return self.runs[-1].draw()


def _over_runs(runs: Sequence[Mapping[str, float]]) -> list[Repeated]:
    found = []
    for name in runs[0]:
        values = [figures[name] for figures in runs if name in figures]
        if len(values) == len(runs):
            median = float(np.median(values))
            spread = (max(values) - min(values)) / median if median else 0.0
            found.append(Repeated(name, values, median, spread))
    return found
