"""How a window scales over GPUs: the document, its tables and its plots.

A row is one size on N GPUs. Speed-up and efficiency are of the step and of the window, against the row of one
GPU. "Not hidden" is the time of a step beyond 1/N of one GPU's, by block: it has communication that nothing
hides, waits for slower ranks, and what smaller kernels lose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from trt_wan.benchmarks.machine.card import Card
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.benchmarks.report.times import WRITING

SCHEMA = "trt-wan-bench-scaling/1"
STAGES = ("condition", "denoise", "decode")
# Tasks of a rank, by the function that does them (runtime/conditioning.py, runtime/networks).
TASKS = {"encode_prefixed": "known frames", "encode_read": "pose", "encode_motion": "face"}
WAITING = "other work and waits"


@dataclass(frozen=True)
class Span:
    """A stage, task or step of a rank in the measured window. Seconds since the window began on rank 0;
    other ranks may begin before.
    """

    rank: int
    what: str
    start: float
    end: float


@dataclass(frozen=True)
class ScalingRow:
    shape: Shape
    gpus: int
    step_seconds: Spread
    window_seconds: float  # from its first stage to that of the next window
    new_frames: int
    stages: Mapping[str, float]  # seconds of the window, by stage
    window: int  # that was measured, of `windows`, 1-based
    windows: int
    writing_seconds: float  # the writing thread's for a window, beside the rest
    start_seconds: float  # from the process's start to the end of a first window with one step
    memory_bytes: list[int | None]  # peak by rank, of the whole GPU less the bytes before; none on the CPU
    error_first_step: float | None  # relative, of the latent after one step, against fewest GPUs
    error: float | None  # the same after all steps
    precision: str
    choices: list[str]  # decisions with their reasons
    spans: list[Span]

    @property
    def frames_per_second(self) -> float:
        return self.new_frames / self.window_seconds


@dataclass(frozen=True)
class Throughput:
    """A job on each of `gpus` GPUs, all at the same time, against one job on all of them. They are the first
    of the `side_by_side` jobs that ran.
    """

    shape: Shape
    gpus: int
    side_by_side: int
    step_seconds: list[float]  # median, by job
    window_seconds: list[float]  # by job
    frames_per_second: float  # all jobs together
    together_frames_per_second: float  # the one job
    step_against_slowest: float  # the step of the slowest job over that of the one job

    @staticmethod
    def of(row: ScalingRow, steps: Sequence[float], windows: Sequence[float]) -> "Throughput":
        """`row` is of the one job, `steps` and `windows` are seconds of every job that ran."""
        n = row.gpus
        return Throughput(
            *(row.shape, n, len(steps), list(steps[:n]), list(windows[:n])),
            sum(row.new_frames / seconds for seconds in windows[:n]),
            row.frames_per_second,
            max(steps[:n]) / row.step_seconds.median,
        )


@dataclass(frozen=True)
class Against:
    """A row against that of one GPU."""

    step: float
    window: float
    efficiency: float  # a step's
    not_hidden_seconds: float  # a block of the step


@dataclass(frozen=True)
class Scaling:
    card: Card
    weights: str
    settings: Mapping[str, Any]
    steps: int
    rows: list[ScalingRow]
    throughput: list[Throughput]
    not_measured: list[str]
    finished: bool = True  # False: more rows are to come
    lost: Sequence[str] = ()  # entries of `not_measured` whose process or GPU was lost
    schema: str = SCHEMA
    stem: ClassVar[str] = "scaling"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [self._row(row) for row in self.rows]}

    def _row(self, row: ScalingRow) -> dict[str, Any]:
        against = self.against(row)
        more = {"frames_per_second": row.frames_per_second, "against_one": against and asdict(against)}
        return {**asdict(row), **more}

    def against(self, row: ScalingRow) -> Against | None:
        """None if one GPU was not measured at that size."""
        one = next((r for r in self.rows if r.gpus == 1 and r.shape == row.shape), None)
        if one is None:
            return None
        alone, step = one.step_seconds.median, row.step_seconds.median
        beyond = (step - alone / row.gpus) / row.shape.config.transformer.layers
        window = one.window_seconds / row.window_seconds
        return Against(alone / step, window, alone / step / row.gpus, beyond)

    @property
    def by_shape(self) -> dict[Shape, list[ScalingRow]]:
        found: dict[Shape, list[ScalingRow]] = {}
        for row in self.rows:
            found.setdefault(row.shape, []).append(row)
        return found

    @property
    def hardware(self) -> str:
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items()) or "the defaults"
        return f"{self.card.hardware}, {self.steps} steps, {settings}; weights {self.weights}"

    def sheets(self) -> list[Sheet | str]:
        heads = ("s/step", "step x", "efficiency", "not hidden ms", "window s", "window x", "frames/s")
        tables: list[Sheet | str] = [
            Sheet("scaling", f"Scaling, {self.hardware}", heads, [self._cells(row) for row in self.rows]),
            "x: against one GPU. Not hidden, in ms a block: the step's time beyond 1/N of one GPU's. It is "
            "communication, waits for slower GPUs, and what smaller kernels lose.",
            Sheet(
                "window",
                "The measured window",
                (*STAGES, WRITING, "which", "start s"),
                [_window(row) for row in self.rows],
            ),
            Sheet(
                "gpu",
                "Peak memory by GPU, and the error against fewest GPUs",
                (),
                list(map(_gpus, self.rows)),
            ),
        ]
        if self.throughput:
            kinds = ("one job", "a job each", "window s of a job", "s/step of a job", "step x, slowest")
            title = "Frames/s of all GPUs: one job on all, or a job on each, side by side"
            rows = list(map(_jobs, self.throughput))
            some = {_gpus_of(made): made for made in self.throughput if made.gpus < made.side_by_side}
            counted = (
                f"{gpus}: the first {made.gpus} of the {made.side_by_side} jobs that ran side by side. "
                for gpus, made in some.items()
            )
            tables += [
                Sheet("throughput", title, kinds, rows),
                f"{''.join(counted)}Step x, slowest: one job's step on all of these GPUs against that of the "
                "slowest GPU, for which the others wait.",
            ]
        return [*tables, *(f"Not measured: {text}" for text in self.not_measured)]

    def _cells(self, row: ScalingRow) -> Row:
        against, window = self.against(row), Figure(row.window_seconds, "s")
        rate = Figure(row.frames_per_second, "frames/s")
        if against is None:
            return _name(row), Figure(row.step_seconds.median, "s"), "", "", "", window, "", rate
        step = Figure(against.step, "times"), Figure(against.efficiency, "%")
        hidden = Figure(against.not_hidden_seconds, "ms") if row.gpus > 1 else ""
        times = Figure(against.window, "times")
        return _name(row), Figure(row.step_seconds.median, "s"), *step, hidden, window, times, rate

    def draw(self) -> Mapping[str, Any]:
        """The speed-up over GPUs, the parts of a window, and a window by GPU for every number above one."""
        from trt_wan.benchmarks.report import plots

        ups = {
            f"{what}, {shape.title}": [
                (row.gpus, getattr(against, what)) for row in rows if (against := self.against(row))
            ]
            for shape, rows in self.by_shape.items()
            for what in ("step", "window")
        }
        drawn: dict[str, Any] = {}
        if any(ups.values()):
            drawn["speed-up"] = plots.speed_up("Speed-up over GPUs", self.hardware, ups)
        groups = {
            _name(row): [_parts(row, plots.LEAST, plots.EXCESS, plots.OTHER)]
            for rows in self.by_shape.values()
            for row in rows
        }
        under = f"{self.hardware}\nthe writing beside it is not shown"
        drawn["windows"] = plots.bars("A window of a long video", under, groups, "seconds of a window")
        for row in self.rows:
            if row.gpus > 1 and row.shape == self.rows[0].shape:
                lanes = {name: [bar] for name, bar in _lanes(row, plots.Bar).items()}
                title = f"One window on {row.gpus} GPUs: {row.window_seconds:.3g} s"
                under = (
                    f"{row.shape.title}, {self.hardware}\nwriting: until a window's frames are on the disk"
                )
                drawn[f"waterfall-{row.gpus}"] = plots.bars(
                    title, under, lanes, "seconds since the window began"
                )
        return drawn


def gpus_text(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _name(row: ScalingRow) -> str:
    return f"{row.shape.title}, {gpus_text(row.gpus)}"


def _window(row: ScalingRow) -> Row:
    stages = (Figure(row.stages.get(stage), "s") for stage in STAGES)
    which = f"{row.window} of {row.windows}"
    return _name(row), *stages, Figure(row.writing_seconds, "s"), which, Figure(row.start_seconds, "s")


def _gpus(row: ScalingRow) -> Row:
    memory = ", ".join(Figure(size, "GB").text for size in row.memory_bytes) or "on the CPU"
    errors = (row.error_first_step, row.error)
    first, last = ("-" if error is None else f"{error:.2e}" for error in errors)
    return _name(row), f"{memory}; latent off by {first} after a step, {last} after all"


def _gpus_of(made: Throughput) -> str:
    part = "" if made.gpus == made.side_by_side else f" of {made.side_by_side}"
    return f"{made.gpus}{part} GPUs"


def _jobs(made: Throughput) -> Row:
    rates = (made.together_frames_per_second, made.frames_per_second)
    windows = ", ".join(f"{s:.2f}" for s in made.window_seconds)
    steps = ", ".join(f"{s:.3f}" for s in made.step_seconds)
    times = Figure(made.step_against_slowest, "times")
    name = f"{made.shape.title}, {_gpus_of(made)}"
    return name, *(Figure(r, "frames/s") for r in rates), windows, steps, times


def _parts(row: ScalingRow, *colours: str) -> Any:
    from trt_wan.benchmarks.report.plots import Bar

    parts = [
        (stage, row.stages.get(stage, 0.0), colour) for stage, colour in zip(STAGES, colours, strict=True)
    ]
    return Bar(parts, f"{row.window_seconds:.3g} s, {row.frames_per_second:.3g} frames/s")


COLOURS = {
    **{"known frames": "#1b6ca8", "pose": "#5fa8d3", "face": "#9ad1d4"},
    **{"step": "#f2a65a", "decode": "#7a9e3f", "writing": "#b56576", WAITING: "#d5dae0"},
}


def _lanes(row: ScalingRow, bar: Any) -> dict[str, Any]:
    """A bar for each rank, whose gaps are `WAITING`, and one for the writing."""
    writing = [span for span in row.spans if span.what == "writing"]
    found = {
        f"GPU {rank}": _lane(
            [span for span in row.spans if span.rank == rank and span not in writing], row.window_seconds, bar
        )
        for rank in range(row.gpus)
    }
    return {**found, "writing, on the host": _lane(writing, 0.0, bar)} if writing else found


def _lane(spans: Sequence[Span], until: float, bar: Any) -> Any:
    parts, at = [], 0.0
    for span in sorted(spans, key=lambda span: span.start):
        if span.start > at:
            parts.append((WAITING if until else "", span.start - at, COLOURS[WAITING] if until else "none"))
        start = max(at, span.start)
        parts.append((span.what, max(0.0, span.end - start), COLOURS.get(span.what, "#9aa5b1")))
        at = max(at, span.end)
    if until > at:
        parts.append((WAITING, until - at, COLOURS[WAITING]))
    return bar(parts)
