"""Where the time of a window goes in a long video, and how far every part is from its floor.

The window is the one before the last of a job of several: it carries frames from the one before, and the
last window's seams are not in it. A floor is the time of a part's products at the rate of this machine's
fastest measured products, or of its bytes at the rate of a copy, the longer of the two. Attention counts like
products of its tier's type.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trt_wan.benchmarks.bench import measure_ceilings
from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.machine.ceilings import Ceiling
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import Child
from trt_wan.benchmarks.measure.sample_clips import write_clips
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import SHARED, with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.benchmarks.work.bound import Rates, budget_rates
from trt_wan.benchmarks.work.cost import Work, seconds_at_best, works
from trt_wan.engines.precision import Precision
from trt_wan.runtime.events import Note, Progress, silent

MODULE = "trt_wan.benchmarks.measure.window_job"
SCHEMA = "trt-wan-bench-window/1"
SMALL = 0.03  # parts with a smaller share of a window are not judged
FAR = 1.4  # times the floor
SPARSE = "sparse_attention"  # counted as if it attended to everything
REST = "the rest of"  # reading, copies and waiting, by stage


@dataclass(frozen=True)
class Part:
    """A network, or the rest of a stage, in one window or once a job."""

    name: str
    stage: str
    calls: int
    seconds: float
    floor_seconds: float | None  # None: no work is counted, or no ceilings were measured

    @property
    def factor(self) -> float | None:
        return self.seconds / self.floor_seconds if self.floor_seconds else None


@dataclass(frozen=True)
class WindowBudget:
    shape: Shape
    card: Card
    weights: str
    settings: Mapping[str, Any]
    choices: list[str]  # decisions with their reasons
    ceilings: list[Ceiling]
    steps: int
    window: int  # its number, 1-based
    windows: int
    seconds: float  # from its first stage to that of the next window
    step_seconds: float  # median of all steps
    writing_seconds: float | None  # the writing thread's, beside the rest; None until the job ends
    stages: Mapping[str, float]
    parts: list[Part]
    once: list[Part]  # per job, outside the windows
    floors: str  # how the floors were found
    not_measured: list[str]
    finished: bool = True  # False: the last window so far, without its networks
    schema: str = SCHEMA
    stem: ClassVar[str] = "window"

    def to_dict(self) -> dict[str, Any]:
        far = [part.name for part in self.far]
        return {**asdict(self), "far_from_floor": far}

    @property
    def far(self) -> list[Part]:
        """Parts of more than 3 % of the window that take more than 1.4 times their floor."""
        return [part for part in self._large if part.factor is not None and part.factor > FAR]

    @property
    def _large(self) -> list[Part]:
        return [part for part in self.parts if part.seconds > SMALL * self.seconds]

    def sheets(self) -> list[Sheet | str]:
        def cells(part: Part, *share: Figure) -> Row:
            times = (
                Figure(part.seconds / part.calls, "ms") if part.calls else "",
                Figure(part.seconds, "ms"),
            )
            floor = Figure(part.floor_seconds, "ms") if part.floor_seconds else ""
            factor = Figure(part.factor, "times") if part.factor else ""
            calls = Figure(part.calls, "count") if part.calls else ""
            return part.name, calls, *times, *share, floor, factor

        def in_window(part: Part) -> Row:
            return cells(part, Figure(part.seconds / self.seconds, "%"))

        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items()) or "the defaults"
        title = (
            f"Window {self.window} of {self.windows}, {self.shape.title}, {self.steps} steps, {settings}, "
            f"{self.card.hardware}"
        )
        heads = ("calls", "ms a call", "ms a window", "share", "floor ms", "times the floor")
        once_heads = ("calls", "ms a call", "ms a job", "floor ms", "times the floor")
        by_stage: list[Row] = [
            *((stage, Figure(seconds, "s")) for stage, seconds in self.stages.items()),
            ("whole window", Figure(self.seconds, "s")),
            ("a step, median", Figure(self.step_seconds, "s")),
            ("writing, beside the rest", Figure(self.writing_seconds, "s")),
        ]
        state = "yes" if self.finished else "no: the job was stopped, or goes on"
        which = [("window", f"{self.window} of {self.windows}"), ("finished", state)]
        far = ", ".join(f"{p.name} ({p.factor:.2f})" for p in self.far)
        judged = f"Above {SMALL:.0%} of the window, and more than {FAR} times the floor: {far or 'nothing'}."
        if unknown := ", ".join(p.name for p in self._large if p.factor is None):
            judged += f" Without a floor: {unknown}."
        if (gpus := self.settings.get("gpus") or 1) > 1:
            judged += f" Calls are those of GPU 0 of {gpus}; a floor is that of whole calls on one GPU."
        if not self.finished:
            judged = "Its networks are not measured yet."
        return [
            Sheet("window", title, ("s",), by_stage),
            Sheet("measured", "Measured", (), which),
            Sheet("part", f"Parts of the window ({self.floors})", heads, list(map(in_window, self.parts))),
            judged,
            Sheet("once", "Once a job", once_heads, [cells(part) for part in self.once]),
            Sheet("choice", "Choices", (), [("choice", text) for text in self.choices]),
            f"Weights: {self.weights}.",
            *(f"Not measured: {text}" for text in self.not_measured),
        ]

    def draw(self) -> Mapping[str, Any]:
        return {}


def measure_window(
    shape: Shape,
    settings: Mapping[str, Any],
    steps: int = 4,
    windows: int = 4,
    weights: str | None = None,
    progress: Progress = silent,
    keep: Callable[[WindowBudget], object] = lambda unfinished: None,
) -> WindowBudget:
    """`windows` are 3 or more. The job runs once before with one step, which finishes the kernels. `keep`
    gets every finished window, with its stages alone.
    """
    card, not_measured = read_card(), list[str]()
    with workplace(shape, (*SHARED, "kernels")) as (env, clips):
        progress(Note("measuring the ceilings of this machine"))
        ceilings = measure_ceilings(shape, card, env, not_measured)
        folder = Path(clips).parent / "windows"
        longer = write_clips(folder, shape.width, shape.height, windows * (shape.window - 1) + 1)
        spec = Spec(shape, str(longer), steps, dict(settings), weights)

        made = partial(
            WindowBudget,
            shape=shape,
            card=card,
            weights=weights or "random: figures are of speed, never of picture quality",
            settings=settings,
            ceilings=ceilings,
            steps=steps,
            windows=windows,
            not_measured=not_measured,
        )

        def keep_window(answer: Mapping[str, Any]) -> None:
            seen = _seen(answer, answer["window"])
            keep(made(**seen, writing_seconds=None, parts=[], once=[], floors="", finished=False))

        if card.gpu is not None:
            progress(Note("a window that is not counted: it finishes the kernels"))
            _run(replace(spec, clips=clips, steps=1), env, progress)
        progress(Note(f"a job of {windows} windows"))
        said = _run(spec, env, progress, keep_window)
    work = _work(shape, said["precision"], settings)
    rates = budget_rates(ceilings, settings.get("tier", "exact") != "exact")
    number = windows - 1
    seen = _seen(said, number)
    return made(
        **seen,
        writing_seconds=said["writing_seconds"] / windows,
        parts=parts(said["networks"], number, seen["stages"], work, rates),
        once=parts(said["networks"], 0, {}, work, rates),
        floors=rates.about if rates else "no ceilings were measured",
    )


def _run(
    spec: Spec,
    env: Mapping[str, str],
    progress: Progress,
    keep: Callable[[Mapping[str, Any]], object] = lambda answer: None,
) -> dict[str, Any]:
    """The answer "windows" of window_job.py. `keep` gets its answers "window"."""

    def run() -> dict[str, Any]:
        with Child(MODULE, [spec.to_json()], env) as child:
            while (answer := child.read())["event"] == "window":
                progress(Note(f"  {answer['text']}"))
                keep(answer)
            return answer

    return with_graphs(run, progress)


def _work(shape: Shape, precision: Precision, settings: Mapping[str, Any]) -> dict[str, Work]:
    """By network. Block-sparse attention computes the share of the blocks that it keeps."""
    work = works(shape.config, replace(shape.plan, precision=precision))
    if SPARSE in work:
        share = float(settings.get("attention_keep") or 0.5)
        work[SPARSE] = replace(work[SPARSE], attention=round(share * work[SPARSE].attention))
    return work


def _seen(said: Mapping[str, Any], window: int) -> dict[str, Any]:
    """A window in an answer of window_job.py, as fields of WindowBudget."""
    stages = {row["stage"]: row["seconds"] for row in said["stages"] if row["window"] == window}
    return {
        "window": window,
        "seconds": sum(stages.values()),
        "stages": stages,
        "step_seconds": Spread.of(said["steps"]).median,
        "choices": said["choices"],
    }


def parts(
    networks: Sequence[Mapping[str, Any]],
    window: int,
    stages: Mapping[str, float],
    work: Mapping[str, Work],
    rates: Rates | None,
) -> list[Part]:
    """The networks of one window and the rest of each stage, the longest first. `networks` are those of
    window_job.py.
    """
    found, in_networks = [], defaultdict[str, float](float)
    for row in networks:
        if row["window"] != window:
            continue
        name, calls, floor = row["name"], row["calls"], None
        if rates is not None and name in work:
            once = seconds_at_best(work[name], rates.units, rates.bytes_per_second)
            floor = None if once is None else calls * once
        found.append(Part(name, row["stage"], calls, row["seconds"], floor))
        in_networks[row["stage"]] += row["seconds"]
    found += [
        Part(f"{REST} {stage}", stage, 0, max(0.0, seconds - in_networks[stage]), None)
        for stage, seconds in stages.items()
    ]
    return sorted(found, key=lambda part: -part.seconds)
