"""A benchmark several times in a row: how far its headline figures spread."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trt_wan.benchmarks.report.result import Result

JOBS = 5  # of a run; the host is shared, and the middle one of three still varies with it
REPEAT_SCHEMA = "trt-wan-bench-repeat/1"
LARGEST_SPREAD = 0.03  # what a headline figure may differ by between runs


@dataclass(frozen=True)
class Repeated:
    """A headline figure over the runs; the spread is its whole range as a part of its median."""

    name: str
    values: list[float]
    median: float
    spread: float

    @property
    def steady(self) -> bool:
        return self.spread <= LARGEST_SPREAD


def repeated(results: Sequence[Result]) -> list[Repeated]:
    """The headline figures that every run has."""
    return _over_runs([result.headlines() for result in results])


def repeated_parts(results: Sequence[Result]) -> list[Repeated]:
    """What starts and jobs are made of: which part of them a spread comes from."""
    return _over_runs([result.parts() for result in results])


def _over_runs(runs: Sequence[Mapping[str, float]]) -> list[Repeated]:
    found = []
    for name in runs[0]:
        values = [figures[name] for figures in runs if name in figures]
        if len(values) == len(runs):
            median = float(np.median(values))
            spread = (max(values) - min(values)) / median if median else 0.0
            found.append(Repeated(name, values, median, spread))
    return found


def to_dict(results: Sequence[Result]) -> dict[str, Any]:
    """The document of several runs."""
    return {
        "schema": REPEAT_SCHEMA,
        "repeatability": [{**asdict(row), "steady": row.steady} for row in repeated(results)],
        "parts": [asdict(row) for row in repeated_parts(results)],
        "runs": [result.to_dict() for result in results],
    }


def to_json(results: Sequence[Result]) -> str:
    return json.dumps(to_dict(results), ensure_ascii=False, allow_nan=False)
