"""Everything `trt-wan bench preprocess` measured: the document, its tables and its plots. Seconds and bytes,
never rounded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trt_wan.benchmarks.machine.card import Card
from trt_wan.benchmarks.machine.monitor import Usage
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.report.sheet import Cell, Figure, Row, Sheet

SCHEMA = "trt-wan-bench-preprocess/1"
# Neighbours in a bar can be told apart. A part has the same colour in both modes.
COLOURS = ("#1b6ca8", "#f2a65a", "#7fb685", "#8b5fa3", "#a8d0ec", "#f0c05a", "#4e8d5a", "#c77dba", "#6b4f7f")


@dataclass(frozen=True)
class InsideTime:
    """A network inside SAM2, timed in one more run over the clip; on a GPU by events."""

    name: str
    calls: int
    seconds: float  # sum over all calls
    median: float  # per call


@dataclass(frozen=True)
class NetworkTimes:
    """A network over all frames of the clip, repeatedly, in its own process."""

    name: str  # detector, pose, sam2
    title: str
    frames: int
    seconds: Spread  # for all frames, from pictures in memory to boxes, joints or outlines
    # The same frames as prepared float arrays, with raw results: more bytes to move than pictures and joints.
    by_arrays: Spread | None
    open_seconds: float  # includes building missing engines
    first_seconds: float  # for all frames, the warm-up
    flops: int | None  # per frame; None if unknown
    batch: int
    runs_on: str
    found: int  # frames with a result
    prompted: int | None  # prompts of SAM2
    inside: list[InsideTime]  # SAM2's networks
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
    """Medians over the runs in seconds per clip, without other parts inside it."""

    name: str
    seconds: float  # on the thread that makes the folder
    beside: float  # on other threads


@dataclass(frozen=True)
class WholeTimes:
    """A folder made repeatedly in one process with opened stages, and the whole command."""

    mode: str
    frames: int
    size: tuple[int, int]  # size of the clips made
    seconds: Spread  # stages opened
    finding: Spread  # the first pass over the clip
    writing: Spread  # the second pass: outlines, drawing, encoding
    parts: list[PartTime]
    open_seconds: float
    first_seconds: float  # the warm-up
    command: Spread  # from the start of the process to its end, engines built before
    command_work: Spread  # opening and making in it, without the start of Python
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
        """Seconds outside all parts."""
        return max(0.0, self.seconds.median - sum(part.seconds for part in self.parts))


@dataclass(frozen=True)
class PreprocessResult:
    sources: Mapping[str, str]  # the file of each network
    clip: str
    frames: int
    size: tuple[int, int]  # size of the clip
    executor: str
    card: Card
    networks: list[NetworkTimes]
    whole: list[WholeTimes]
    not_measured: list[str]
    version: str
    time: str
    finished: bool = True  # False: more figures are to come
    schema: str = SCHEMA
    stem: ClassVar[str] = "preprocess"

    @property
    def title(self) -> str:
        width, height = self.size
        return f"{self.frames} frames, {width}x{height}, {self.card.hardware}"

    def headlines(self) -> dict[str, float]:
        """Frames per second and seconds: the figures by which two results are compared."""
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
        return {**dataclasses.asdict(self), "headlines": self.headlines()}

    def sheets(self) -> list[Sheet | str]:
        width, height = self.size
        job = [*self.card.rows(), ("clip", f"{self.clip}: {self.frames} frames, {width}x{height}")]
        found: list[Sheet | str] = [
            Sheet("job", f"trt-wan {self.version}, {self.time}", (), [*job, *self.sources.items()]),
            Sheet("network", NETWORKS, NETWORK_HEADS, [_network_row(n) for n in self.networks]),
        ]
        found += [_inside(n) for n in self.networks if n.inside]
        rows = [(name, *(value(w) for w in self.whole)) for name, value in WHOLE]
        modes = [w.mode for w in self.whole]
        found.append(Sheet("whole", "A whole preprocessing: median (p10 to p90) of n", modes, rows))
        found.append(self._parts())
        if self.not_measured:
            found.append("Not measured: " + "; ".join(self.not_measured))
        return found

    def _parts(self) -> Sheet:
        by_mode = [{part.name: part for part in w.parts} for w in self.whole]
        rows: list[Row] = []
        for name in dict.fromkeys(name for parts in by_mode for name in parts):
            cells: list[Cell] = []
            for parts in by_mode:
                part = parts.get(name)
                cells += [
                    Figure(seconds, "s") if seconds else ""
                    for seconds in ((part.seconds, part.beside) if part else (0, 0))
                ]
            rows.append((name, *cells))
        rows.append(("rest", *(cell for w in self.whole for cell in (Figure(w.rest, "s"), ""))))
        heads = [head for w in self.whole for head in (w.mode, f"{w.mode}, beside it")]
        title = "Parts, stages opened: seconds on the thread that makes the folder, and on threads beside it"
        return Sheet("part", title, heads, rows)

    def draw(self) -> Mapping[str, Any]:
        """Frames per second of each network, and the parts of a whole preprocessing."""
        from trt_wan.benchmarks.report.plots import INK, LEAST, OTHER, Bar, bars, readable

        kinds = (
            ("from pictures to results, work on the host included", LEAST),
            ("arrays in, arrays out", OTHER),
        )
        rates = {
            f"{n.name}\n{n.title}": [
                Bar([(name, rate, colour)], readable(rate))
                for (name, colour), rate in zip(kinds, (n.rate, n.by_arrays_rate), strict=True)
                if rate is not None
            ]
            for n in self.networks
        }
        names = dict.fromkeys(part.name for w in self.whole for part in w.parts if part.seconds)
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)} | {"rest": OTHER}
        groups = {}
        for w in self.whole:
            parts = [(p.name, p.seconds, colours[p.name]) for p in w.parts if p.seconds]
            for label, stack, spread in (
                (f"{w.mode}\nstages opened", [*parts, ("rest", w.rest, OTHER)], w.seconds),
                (f"{w.mode}\nwhole command", [("", w.command.median, INK)], w.command),
            ):
                text = f"{readable(spread.median)} s, {readable(w.frames / spread.median)} frames/s"
                groups[label] = [Bar(stack, text)]
        count = self.networks[0].seconds.count
        return {
            "preprocess-networks": bars(
                f"Frames per second of each network (median of {count} runs)",
                self.title,
                rates,
                "frames per second",
            ),
            "preprocess-whole": bars(
                f"A whole preprocessing: {self.whole[0].frames} frames (medians of {count} runs)",
                self.title,
                groups,
                "seconds; parts are those of the thread that makes the folder",
            ),
        }


NETWORKS = "Networks: frames per second from pictures to results; by arrays: prepared floats in, raw ones out"
NETWORK_HEADS = (
    "frames/s",
    "ms a frame",
    "runs",
    "TFLOP/s",
    "by arrays frames/s",
    "batch",
    "found in",
    "opened in s",
    "GPU memory",
    "host memory",
)


def _network_row(n: NetworkTimes) -> Row:
    prompts = f", {n.prompted} prompts" if n.prompted is not None else ""
    return (
        f"{n.name}{prompts}",
        Figure(n.rate, "frames/s"),
        Figure(1 / n.rate, "ms"),
        Figure(n.seconds.count, "count"),
        Figure(n.rate * n.flops, "TFLOP/s") if n.flops else "",
        Figure(n.by_arrays_rate, "frames/s") if n.by_arrays_rate else "",
        Figure(n.batch, "count"),
        Figure(n.found, "count"),
        Figure(n.open_seconds, "s"),
        Figure(n.usage.peak_memory_bytes, "GB"),
        Figure(n.host_peak_bytes, "GB"),
    )


def _inside(n: NetworkTimes) -> Sheet:
    whole = sum(row.seconds for row in n.inside)
    rows = [
        (
            row.name,
            Figure(row.calls, "count"),
            Figure(row.median, "ms"),
            Figure(row.seconds, "s"),
            Figure(row.seconds / whole, "%"),
        )
        for row in n.inside
    ]
    heads = ("calls", "ms a call, median", "seconds a clip", "of all")
    return Sheet(f"{n.name} network", f"Inside {n.name}, over the clip once more", heads, rows)


def _spread(spread: Spread) -> Figure:
    return Figure(spread.median, "s", f" ({spread.p10:.3f} to {spread.p90:.3f}) of {spread.count}")


WHOLE: tuple[tuple[str, Callable[[WholeTimes], Cell]], ...] = (
    ("stages opened: seconds a clip", lambda w: _spread(w.seconds)),
    ("frames per second", lambda w: Figure(w.rate, "frames/s")),
    ("finding the person", lambda w: _spread(w.finding)),
    ("writing the clips", lambda w: _spread(w.writing)),
    ("the first clip, warming up", lambda w: Figure(w.first_seconds, "s")),
    ("opening the stages", lambda w: Figure(w.open_seconds, "s")),
    ("whole command, from process start", lambda w: _spread(w.command)),
    ("opening and making in it", lambda w: _spread(w.command_work)),
    ("clips made", lambda w: f"{w.frames} frames, {w.size[0]}x{w.size[1]}"),
    ("peak device memory", lambda w: Figure(w.usage.peak_memory_bytes, "GB")),
    ("peak device memory of the command", lambda w: Figure(w.command_usage.peak_memory_bytes, "GB")),
    ("peak host memory", lambda w: Figure(w.host_peak_bytes, "GB")),
)
