"""`trt-wan build`: graphs, and engines for the GPU that is there or for named ones, which need not be.

On the GPU that is there it then measures the candidates for the places that more than one can take.
Without a GPU and without a target there is nobody to build engines for: then it exports the graphs, which is
all that ONNX Runtime needs.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.report import (
    CandidateReady,
    CandidateStep,
    EngineReady,
    EngineStep,
    Report,
    Result,
    readable_bytes,
    table,
)
from trt_wan.errors import EnvironmentBroken, UsageError

if TYPE_CHECKING:
    from trt_wan.build.autotune import Measured, Measuring
    from trt_wan.build.compile import CompileReport, EngineDone, EngineProgress, EngineRow, GraphDone
    from trt_wan.engines.choice.candidates import Candidate, Machine
    from trt_wan.engines.config import ModelConfig
    from trt_wan.engines.flavour import Flavour
    from trt_wan.engines.gpu import Target
    from trt_wan.engines.precision import Precision
    from trt_wan.engines.shape import Plan
    from trt_wan.engines.store.measurements import Figure
    from trt_wan.runtime.device.gpu import Gpu

Data = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """The engines of one target."""

    target: "Target"
    plan: "Plan"
    flavour: "Flavour"
    gpu: "Gpu | None" = None  # for the target "current", and only then

    @property
    def machine(self) -> "Machine | None":
        from trt_wan.runtime.opening.segments import machine_of

        return None if self.gpu is None else machine_of(self.gpu, self.flavour)

    def missing(self, candidate: "Candidate") -> str | None:
        from trt_wan.runtime.opening.segments import missing

        return None if self.gpu is None else missing(candidate, self.gpu.capability)


def _size(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d+)[x×](\d+)", value):
        return int(match[1]), int(match[2])
    raise click.BadParameter(f"{value!r} is not a size such as 832x480.")


def _targets(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        return ()
    from trt_wan.engines.gpu import TARGETS

    names = dict.fromkeys(name.strip().lower() for value in values for name in value.split(","))
    for name in names:
        if name not in TARGETS:
            raise click.BadParameter(f"{name!r} is no target; there are {', '.join(TARGETS)}.")
    return tuple(names)


@click.command(short_help="Build engines, or export the graphs, for a size.")
@click.option("--model", type=click.Choice(["14b", "tiny"]), default="14b", show_default=True)
@click.option(
    "--size",
    callback=_size,
    default="832x480",
    metavar="WxH",
    show_default=True,
    help="Of the video, width x height.",
)
@click.option("--window", type=int, default=77, show_default=True, help="Frames per window, 4k+1.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8"]),
    help="Default: fp8 where the GPU has it, else bf16; fp32 for graphs alone.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    callback=_targets,
    metavar="sm89,sm120",
    help="GPUs to build for, which need not be here. Default: the one that is.",
)
@click.option(
    "--flavour",
    type=click.Choice(["tensorrt", "tensorrt_rtx"]),
    help="Default: what suits the GPU; tensorrt_rtx for named targets.",
)
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Measure the candidates again, or not at all. Default: those that were not yet, on this GPU.",
)
@click.option(
    "--sam2",
    metavar="NAME|FILE",
    help="Build SAM2's engines instead: of a model such as base_plus, or of the one that a file holds.",
)
@click.option("--dry-run", is_flag=True, help="Say what is there and what would be built; build nothing.")
@command
def build(
    *,
    report: Report,
    model: str,
    size: tuple[int, int],
    window: int,
    precision: "Precision | None",
    targets: "tuple[Target, ...]",
    flavour: str | None,
    measure: bool | None,
    sam2: str | None,
    dry_run: bool,
) -> Any:
    """Build the engines of one size and window length for the GPU that is here, or for named ones.

    On the GPU that is here it measures the candidates for attention and the parts of a block around it; a run
    takes the fastest that is accurate enough.

    Without a GPU and without --target it exports the graphs, which ONNX Runtime runs on the CPU. It needs no
    weights. What is there already stays, so a build that was stopped goes on where it was.

    \b
    trt-wan build --size 832x480 --window 77
    trt-wan build --size 832x480 --window 77 --target sm89,sm120
    trt-wan build --sam2 base_plus
    """
    if sam2 is not None:
        from trt_wan.cli.build_sam2 import build_sam2_for

        if precision is not None or measure:
            raise UsageError(
                "SAM2's engines are fp16, and nothing of them is measured.",
                "Leave out --precision and --measure.",
            )
        return build_sam2_for(report, sam2, targets, flavour, dry_run)
    return build_for(report, model, size, window, precision, targets, flavour, measure, dry_run)


def build_for(
    report: Report,
    model: str,
    size: tuple[int, int],
    window: int,
    precision: "Precision | None" = None,
    targets: "Sequence[Target]" = (),
    flavour: str | None = None,
    measure: bool | None = None,
    dry_run: bool = False,
) -> tuple[Result, Data]:
    """The result and the data of `trt-wan build`. `measure`: again, not at all, or what was not."""
    from trt_wan.engines.shape import Plan

    plan = Plan(*size, window)  # refuses before anything is looked for
    goals = (
        [_named(plan, precision, target, flavour) for target in targets]
        if targets
        else _here(report, plan, precision, flavour)
    )
    if measure and not any(goal.gpu for goal in goals):
        raise UsageError("Candidates are measured on the GPU that they are for.", "Leave --measure out.")
    if not goals:
        return _graphs(report, model, replace(plan, precision=precision or "fp32"), dry_run)
    return _engines(report, model, goals, measure, dry_run)


def _named(plan: "Plan", precision: "Precision | None", target: "Target", flavour: str | None) -> Goal:
    from trt_wan.engines.choice.recipes import require_target
    from trt_wan.engines.flavour import choose_flavour
    from trt_wan.engines.gpu import TARGETS

    if target == "current":
        return _current(_gpu("Name one to build for, such as --target sm89."), plan, precision, flavour)
    goal = Goal(
        target,
        replace(plan, precision=precision or ("fp8" if TARGETS[target].fp8 else "bf16")),
        choose_flavour(flavour, None),
    )
    require_target(goal.plan, target)  # before the engines of another target are built
    return goal


def _here(report: Report, plan: "Plan", precision: "Precision | None", flavour: str | None) -> list[Goal]:
    """For the GPU that is there, if there is one and a TensorRT for it: the same choice as that of a run."""
    try:
        gpu = _gpu()
    except EnvironmentBroken as error:
        note(report, f"Graphs only; engines need a GPU or --target. {error.message}")
        return []
    try:
        return [_current(gpu, plan, precision, flavour)]
    except EnvironmentBroken as error:
        if flavour is not None:
            raise
        note(report, f"Graphs only. {error.message} {error.hint}")
        return []


def _gpu(hint: str = "") -> "Gpu":
    from trt_wan.runtime.device.gpu import Gpu

    try:
        return Gpu()
    except EnvironmentBroken as error:
        raise EnvironmentBroken(error.message, hint) from error


def _current(gpu: "Gpu", plan: "Plan", precision: "Precision | None", flavour: str | None) -> Goal:
    from trt_wan.engines.flavour import choose_flavour
    from trt_wan.runtime.opening.model import choose_precision
    from trt_wan.runtime.settings import Settings

    chosen = choose_precision(Settings(precision=precision), gpu)
    return Goal("current", replace(plan, precision=chosen), choose_flavour(flavour, gpu.capability), gpu)


def _graphs(report: Report, model: str, plan: "Plan", dry_run: bool) -> tuple[Result, Data]:
    """The graphs' folder; torch is imported only if a graph is missing."""
    from trt_wan.engines.config import MODELS
    from trt_wan.engines.contracts import networks
    from trt_wan.engines.store.graphs import graph_set

    config = MODELS[model]
    graphs = graph_set(config, plan)
    folder, there = graphs.folder, graphs.complete()
    if dry_run:
        missing = [] if there else list(networks(config, plan))
        text = f"{len(missing)} graphs would be exported" if missing else "the graphs are there"
        return f"{text}: {folder}", {"missing_graphs": missing, "engines": []}
    seconds: list[float] = []

    def exported(name: str, duration: float) -> None:
        seconds.append(duration)
        _exported(report, name, duration)

    if not there:
        try:
            from trt_wan.build.graphs import build_graphs

            build_graphs(config, plan, exported)
        except ImportError as error:  # torch imports onnxscript only when it exports
            raise UsageError(
                f"Exporting graphs needs packages that are not here ({error}).",
                "Run: pip install 'trt-wan[build]'",
            ) from error
    total, memory = round(sum(seconds), 2), _peak_memory_gb()
    if seconds:
        note(report, f"{len(seconds)} graphs in {total} s, {memory} GB of memory at most")
    data = {"graphs": len(seconds), "engines": [], "seconds": total, "peak_memory_gb": memory}
    return folder, data


def _engines(
    report: Report, model: str, goals: list[Goal], measure: bool | None, dry_run: bool
) -> tuple[Result, Data]:
    """The engines' folder, or a table of what would be built."""
    from trt_wan.build.compile import compile_engines
    from trt_wan.engines.config import MODELS
    from trt_wan.engines.store.manifest import folder

    start = time.perf_counter()
    graphs = 0
    reports: list[CompileReport] = []
    figures: list[Figure] = []
    for goal in goals:
        flavour = goal.flavour
        note(
            report,
            f"{goal.target}: {goal.plan.precision}, {flavour.name} {flavour.version} ({flavour.reason})",
        )

        def progress(event: "GraphDone | EngineProgress | EngineDone") -> None:
            nonlocal graphs
            graphs += _tell(report, event)

        try:
            done = compile_engines(
                MODELS[model],
                goal.plan,
                goal.target,
                flavour,
                progress,
                machine=goal.machine,
                missing=goal.missing,
                dry_run=dry_run,
            )
        except KeyboardInterrupt as stop:
            stop.add_note("Finished engines stay: the same command goes on from there.")
            raise
        reports.append(done)
        if not dry_run:
            note(report, _summary(goal.target, done))
        if goal.gpu is not None and not dry_run:
            _finish(report, MODELS[model], goal, done)
        if goal.gpu is not None and measure is not False and not dry_run:
            figures += _measure(report, MODELS[model], goal, done, again=bool(measure))

    engines = [_row(goal, row) for goal, done in zip(goals, reports, strict=True) for row in done.engines]
    if dry_run:
        missing = {goal.plan: done.missing_graphs for goal, done in zip(goals, reports, strict=True)}
        names = [f"{name} ({plan.precision})" for plan, lacking in missing.items() for name in lacking]
        if names:
            note(report, f"{len(names)} graphs would be exported first.")
        return _table(engines), {"missing_graphs": names, "engines": engines}
    return folder(), {
        "graphs": graphs,
        "engines": engines,
        "candidates": [vars(figure) for figure in figures],
        "removed": sum(done.removed for done in reports),
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_gb": _peak_memory_gb(),
    }


def _finish(report: Report, config: "ModelConfig", goal: Goal, done: "CompileReport") -> None:
    from trt_wan.engines.choice.recipes import recipes_here
    from trt_wan.runtime.segments.tensorrt import finish_engines

    assert goal.machine is not None and goal.gpu is not None, goal
    if not (made := {row.manifest.key for row in done.engines if row.manifest}):
        return
    recipes = recipes_here(config, goal.plan, goal.machine).values()
    finish_engines(goal.gpu, (r for r in recipes if r.engine.key in made), report.progress)


def _measure(
    report: Report, config: "ModelConfig", goal: Goal, done: "CompileReport", again: bool
) -> "list[Figure]":
    """Measures what can be opened on the GPU that is here, and says what a run will take."""
    from trt_wan.build.autotune import autotune
    from trt_wan.engines.choice.recipes import recipes_here
    from trt_wan.engines.store.measurements import title
    from trt_wan.runtime.opening.segments import open_segments

    gpu, machine = goal.gpu, goal.machine
    assert gpu is not None and machine is not None, goal
    recipes = recipes_here(config, goal.plan, machine)
    impossible = {(row.name, row.target): row.problem for row in done.engines if row.problem}

    def missing(candidate: "Candidate") -> str | None:
        engine = candidate.engine
        sentence = impossible.get((engine.recipe, engine.target)) if engine else None
        return sentence or goal.missing(candidate)

    def opened(candidate: "Candidate") -> Any:
        places = {candidate.network: candidate}
        segments = open_segments(places, config, goal.plan, gpu, recipes, report.progress)
        return segments[candidate.network]

    def progress(event: "Measured | Measuring") -> None:
        _tell_measured(report, event)

    figures = autotune(config, goal.plan, machine, gpu, opened, missing, progress, again=again)
    for figure in figures:
        if figure.chosen:
            note(report, f"{figure.chosen}: {figure.network} = {figure.candidate} ({title(figure)})")
    return figures


def _tell_measured(report: Report, event: "Measured | Measuring") -> None:
    from trt_wan.build.autotune import Measuring
    from trt_wan.engines.store.measurements import title

    if isinstance(event, Measuring):
        report.progress(CandidateStep(**vars(event)))
        return
    f = event.figure
    report.progress(
        CandidateReady(
            f.network,
            f.candidate,
            event.number,
            event.candidates,
            f.state,
            f.ms,
            f.error,
            f.tolerance,
            title(f),
        )
    )


def _tell(report: Report, event: "GraphDone | EngineProgress | EngineDone") -> int:
    """How many graphs the event adds."""
    from trt_wan.build.compile import EngineProgress, GraphDone

    if isinstance(event, GraphDone):
        _exported(report, event.name, event.seconds)
        return 1
    if isinstance(event, EngineProgress):
        report.progress(EngineStep(**vars(event)))
    else:
        row = event.row
        report.progress(
            EngineReady(
                row.target,
                row.name,
                event.number,
                event.engines,
                row.state,
                row.seconds,
                row.bytes,
                row.problem,
            )
        )
    return 0


def _exported(report: Report, name: str, seconds: float) -> None:
    note(report, f"exported {name} in {seconds:.1f} s")


def _summary(target: str, done: "CompileReport") -> str:
    made = [row for row in done.engines if row.manifest]
    built = [row for row in made if row.state == "built"]
    size = readable_bytes(sum(row.bytes for row in made))
    text = (
        f"{target}: {len(made)} engines, {size}; {len(built)} built in "
        f"{sum(row.seconds for row in built):.1f} s, {len(made) - len(built)} were there"
    )
    return f"{text}; {done.removed} older ones made room" if done.removed else text


def _row(goal: Goal, row: "EngineRow") -> Data:
    return {
        "name": row.name,
        "target": row.target,
        "precision": goal.plan.precision,
        "state": row.state,
        "problem": row.problem,
        "seconds": row.seconds,
        "bytes": row.bytes,
        "key": row.manifest.key if row.manifest else None,
    }


def _table(engines: Sequence[Data]) -> str:
    rows = [("ENGINE", "TARGET", "PRECISION", "STATE", "SIZE", "BUILT IN")]
    for e in engines:
        name = (e["name"], e["target"], e["precision"])
        if e["state"] == "there":
            rows.append((*name, "there", readable_bytes(e["bytes"]), f"{e['seconds']:.1f} s"))
        else:
            rows.append((*name, "would be built", "", ""))
    return table(rows)


def _peak_memory_gb() -> float | None:
    """Of this process so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
