"""A benchmark several times in a row: how far its headline figures spread."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trt_wan.benchmarks.result import Result

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
    """Figures that every run has."""
    headlines = [result.headlines() for result in results]
    found = []
    for name in headlines[0]:
        values = [figures[name] for figures in headlines if name in figures]
        if len(values) == len(results):
            median = float(np.median(values))
            found.append(Repeated(name, values, median, (max(values) - min(values)) / median))
    return found


def to_dict(results: Sequence[Result]) -> dict[str, Any]:
    """The document of several runs."""
    return {
        "schema": REPEAT_SCHEMA,
        "repeatability": [{**asdict(row), "steady": row.steady} for row in repeated(results)],
        "runs": [result.to_dict() for result in results],
    }


def to_json(results: Sequence[Result]) -> str:
    return json.dumps(to_dict(results), ensure_ascii=False, allow_nan=False)
