"""Everything that `trt-wan bench preprocess` measured, as it is written to preprocess.json and its table.
Seconds and bytes, never rounded.
"""

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_wan.benchmarks.measure.card import Card
from trt_wan.benchmarks.measure.monitor import Usage
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.report.files import Row

SCHEMA = "trt-wan-bench-preprocess/1"


@dataclass(frozen=True)
class InsideTime:
    """A network that others are made of, in one more run over the clip: on a GPU by events."""

    name: str
    calls: int
    seconds: float  # of all calls
    median: float  # of a call


@dataclass(frozen=True)
class NetworkTimes:
    """A network over all frames of the clip, again and again, in a process of its own."""

    name: str  # detector, pose, sam2
    title: str
    frames: int
    seconds: Spread  # of all frames, from pictures in memory to boxes, joints or outlines
    # The same frames as float arrays that the host has prepared, and raw results to it: more bytes to move
    # than pictures and joints are, where a GPU prepares and reads them.
    by_arrays: Spread | None
    open_seconds: float  # engines that were missing are built in it
    first_seconds: float  # of all frames, the warm-up
    flops: int | None  # of one frame; None where it is not known
    batch: int
    runs_on: str
    found: int  # frames in which something was found
    prompted: int | None  # frames that SAM2 was prompted on
    inside: list[InsideTime]  # of SAM2: its networks
    notes: list[str]
    host_peak_bytes: int | None
    usage: Usage

    @property
    def rate(self) -> float:
        return self.frames / self.seconds.median

    @property
    def by_arrays_rate(self) -> float | None:
        return self.frames / self.by_arrays.median if self.by_arrays else None


@dataclass(frozen=True)
class PartTime:
    """Medians over the runs, in seconds of a whole clip, without what it calls of other parts."""

    name: str
    seconds: float  # on the thread that makes the folder
    beside: float  # on others, meanwhile


@dataclass(frozen=True)
class WholeTimes:
    """A folder made again and again in one process, its stages opened once; and the whole command."""

    mode: str
    frames: int
    size: tuple[int, int]  # of the clips that were made
    seconds: Spread  # stages opened
    finding: Spread | None  # its first pass over the clip: who is where
    writing: Spread | None  # its second: outlines, drawing, encoding
    parts: list[PartTime]
    open_seconds: float
    first_seconds: float  # the warm-up
    command: Spread  # from the start of the process to its end, engines built before
    command_work: (
        Spread  # of that, what the command itself counts: opening and making, without Python's start
    )
    runs_on: str
    notes: list[str]
    host_peak_bytes: int | None
    usage: Usage  # stages opened
    command_usage: Usage

    @property
    def rate(self) -> float:
        return self.frames / self.seconds.median

    @property
    def rest(self) -> float:
        """Seconds that no part accounts for."""
        return max(0.0, self.seconds.median - sum(part.seconds for part in self.parts))


@dataclass(frozen=True)
class PreprocessResult:
    sources: Mapping[str, str]  # of each network: its file, or that it is random
    random: list[str]  # networks with random weights
    clip: str
    frames: int
    size: tuple[int, int]  # of the clip
    executor: str
    card: Card
    networks: list[NetworkTimes]
    whole: list[WholeTimes]
    not_measured: list[str]
    version: str
    time: str
    schema: str = SCHEMA

    @property
    def title(self) -> str:
        width, height = self.size
        return f"{self.frames} frames, {width}x{height}, {self.card.hardware}"

    @property
    def about_random(self) -> str:
        """What a reader must know before believing more than speed; empty if all networks are the user's."""
        if not self.random:
            return ""
        return (
            f"Random weights: {', '.join(self.random)}. Their shapes are those of the named networks, so "
            "this is their speed. The person that is found is planted, and outlines are nearly the whole "
            "picture, so that the background clip is nearly black and quicker to encode."
        )

    def headlines(self) -> dict[str, float]:
        """Frames per second and seconds, for a glance and for comparing."""
        figures = {f"{n.name} frames/s": n.rate for n in self.networks}
        figures |= {
            f"{n.name} by arrays frames/s": n.by_arrays_rate for n in self.networks if n.by_arrays_rate
        }
        for whole in self.whole:
            figures[f"{whole.mode} frames/s, opened"] = whole.rate
            figures[f"{whole.mode} s, opened"] = whole.seconds.median
            figures[f"{whole.mode} s, whole command"] = whole.command.median
        return figures

    def to_dict(self) -> dict[str, Any]:
        said = {"about_random": self.about_random, "headlines": self.headlines()}
        return {**dataclasses.asdict(self), **said}

    def to_json(self) -> str:
        """One line. Unknown figures are null, so that any reader takes it."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


def write_files(result: PreprocessResult, folder: Path) -> list[Path]:
    """Every file that was written, plots only where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    document, rows = folder / "preprocess.json", folder / "preprocess.csv"
    document.write_text(result.to_json() + "\n")
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "name", "unit", "value"))
        writer.writerows(figures(result))
    try:
        from trt_wan.benchmarks.preprocess.plots import draw
    except ModuleNotFoundError:
        return [document, rows]
    return [document, rows, *draw(result, folder)]


def figures(result: PreprocessResult) -> Iterator[Row]:
    """The result as lines for a spreadsheet."""
    yield "job", "clip", "", result.title
    yield "job", "random networks", "", ", ".join(result.random)
    for n in result.networks:
        yield "network", n.name, "frames/s", n.rate
        yield "network", n.name, "s a clip", n.seconds.median
        if n.by_arrays_rate is not None:
            yield "network by arrays", n.name, "frames/s", n.by_arrays_rate
        for inside in n.inside:
            yield f"{n.name} network", inside.name, "s a call", inside.median
        yield from _memory(n.name, n.host_peak_bytes, n.usage)
    for w in result.whole:
        yield "whole, opened", w.mode, "frames/s", w.rate
        yield "whole, opened", w.mode, "s", w.seconds.median
        yield "whole command", w.mode, "s", w.command.median
        for name, spread in (("finding", w.finding), ("writing", w.writing)):
            if spread is not None:
                yield f"{w.mode} pass", name, "s", spread.median
        for part in w.parts:
            yield f"{w.mode} part", part.name, "s", part.seconds
            yield f"{w.mode} part beside", part.name, "s", part.beside
        yield f"{w.mode} part", "rest", "s", w.rest
        yield from _memory(w.mode, w.host_peak_bytes, w.usage)


def _memory(name: str, host: int | None, usage: Usage) -> Iterator[Row]:
    if host is not None:
        yield "peak host memory", name, "B", host
    if usage.peak_memory_bytes is not None:
        yield "peak device memory", name, "B", usage.peak_memory_bytes
