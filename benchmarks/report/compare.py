"""Two results side by side: ratios with their spread. Results of different jobs are refused: their ratio
means nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trt_wan.benchmarks.report.repeat import REPEAT_SCHEMA
from trt_wan.benchmarks.report.result import OURS, SCHEMA
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.errors import InputError, UsageError

RESAMPLES = 2000
SAME = ("model", "width", "height", "window")  # keys of the shape


@dataclass(frozen=True)
class Ratio:
    """`second` over `first`; `low` and `high` hold 95 % of it, None for a figure that was measured once."""

    name: str
    first: float
    second: float
    ratio: float
    low: float | None = None
    high: float | None = None

    @property
    def differs(self) -> bool | None:
        """Whether 1 lies outside; None for figures that were measured once."""
        return None if self.low is None or self.high is None else not self.low <= 1 <= self.high


@dataclass(frozen=True)
class Comparison:
    shape: str
    first: str
    second: str
    ratios: list[Ratio]
    warnings: list[str]
    stem: ClassVar[str] = "compare"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sheets(self) -> list[Sheet | str]:
        def cells(row: Ratio) -> Row:
            if row.low is None or row.high is None:
                spread, verdict = "measured once", ""
            else:
                spread = f"{row.low:.3f} to {row.high:.3f}"
                verdict = "differs" if row.differs else "no difference seen"
            return (
                row.name,
                Figure(row.first),
                Figure(row.second),
                Figure(row.ratio, "times"),
                spread,
                verdict,
            )

        heads = (self.first, self.second, "second / first", "95 % of the ratio", "")
        shown = Sheet("ratio", f"{self.shape}: seconds, bytes", heads, [cells(row) for row in self.ratios])
        return [shown, *(f"Different {warning}" for warning in self.warnings)]

    def draw(self) -> Mapping[str, Any]:
        return {}


def compare(first: Path, second: Path) -> Comparison:
    """Raises InputError for files that are not results, UsageError for results of different jobs."""
    a, b = load(first), load(second)
    for key in SAME:
        values = [runs[0]["shape"][key] for runs in (a, b)]
        if values[0] != values[1]:
            raise UsageError(
                f"{first.name} has the {key} {values[0]}, {second.name} {values[1]}.",
                "They cannot be compared: measure both at the same model, size and window.",
            )
    shape = a[0]["shape"]
    warnings = [
        f"{name}: {x} against {y}"
        for name, x, y in (
            ("hardware", _hardware(a[0]), _hardware(b[0])),
            ("precision", a[0]["precision"], b[0]["precision"]),
            ("weights", a[0]["weights"], b[0]["weights"]),
            ("settings", a[0]["settings"], b[0]["settings"]),
        )
        if x != y
    ]
    return Comparison(
        f"{shape['model']} {shape['width']}x{shape['height']}x{shape['window']}",
        f"{first.name} ({a[0]['time']})",
        f"{second.name} ({b[0]['time']})",
        list(_ratios(a, b)),
        warnings,
    )


def load(path: Path) -> list[Mapping[str, Any]]:
    """The runs in a bench.json: one, or several of --repeat."""
    try:
        document = json.loads(path.read_text().splitlines()[-1])
        runs = document["runs"] if document["schema"] == REPEAT_SCHEMA else [document]
        known = all(run["schema"] == SCHEMA for run in runs)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        known = False
    if not known:
        raise InputError(
            f"{path} is not a result of a benchmark.", "Name the bench.json that --out DIR writes."
        )
    return list(runs)


def _hardware(run: Mapping[str, Any]) -> str:
    return str((run["card"]["gpu"] or {"name": run["card"]["cpu"]})["name"])


def _ratios(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[Ratio]:
    found = []
    for name in a[0]["headlines"]:
        if all(name in run["headlines"] for run in (*a, *b)):
            first, second = (_values(runs, name) for runs in (a, b))
            found.append(_ratio(name, first, second))
    return found


def _values(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """All measurements of a headline: every step, or one figure per run."""
    if name == f"{OURS} s/step":
        return [s for run in runs for seconds in run["steps"]["rounds"] for s in seconds]
    peers = [peer for run in runs for peer in run["peers"] if name == f"{peer['title']} s/step"]
    if peers:
        return [s for peer in peers for seconds in peer["rounds"] for s in seconds]
    return [run["headlines"][name] for run in runs]


def _ratio(name: str, first: Sequence[float], second: Sequence[float]) -> Ratio:
    """The ratio of the medians. Its spread comes from resampling (bootstrap) with fixed random numbers."""
    a, b = np.asarray(first), np.asarray(second)
    ratio = float(np.median(b) / np.median(a))
    if len(a) < 3 or len(b) < 3:
        return Ratio(name, float(np.median(a)), float(np.median(b)), ratio)
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(x, (RESAMPLES, len(x))), axis=1) for x in (a, b)]
    low, high = np.percentile(medians[1] / medians[0], (2.5, 97.5))
    return Ratio(name, float(np.median(a)), float(np.median(b)), ratio, float(low), float(high))
