"""The goal of a build: a target with its plan and its TensorRT, and on this machine's GPU the GPU itself.

`compile_goal` builds the engines; `tune_goal` finishes their kernels and measures the candidates.
"""

from dataclasses import dataclass, replace

from trt_wan.build.autotune import autotune
from trt_wan.build.compile import CompileReport, compile_engines
from trt_wan.engines.choice.candidates import Candidate, Machine
from trt_wan.engines.choice.recipes import recipes_here, require_target
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.flavour import Flavour, choose_flavour
from trt_wan.engines.gpu import TARGETS, Target
from trt_wan.engines.precision import Precision, best_precision, require_fp8
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.measurements import Figure, title
from trt_wan.errors import EnvironmentBroken
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.opening.segments import machine_of, missing
from trt_wan.runtime.segments.tensorrt import finish_engines


@dataclass(frozen=True)
class Goal:
    """The engines of one target."""

    target: Target
    plan: Plan
    flavour: Flavour
    gpu: Gpu | None = None  # set for the target "current" only

    @property
    def machine(self) -> Machine | None:
        return None if self.gpu is None else machine_of(self.gpu, self.flavour)

    def missing(self, candidate: Candidate) -> str | None:
        return None if self.gpu is None else missing(candidate, self.gpu.capability)


def named_goal(plan: Plan, precision: Precision | None, target: Target, flavour: str | None) -> Goal:
    """The goal for a target by name. Raises UsageError, and EnvironmentBroken for "current" without a GPU."""
    if target == "current":
        return _current(_gpu("Name one to build for, such as --target sm89."), plan, precision, flavour)
    chosen: Precision = precision or ("fp8" if TARGETS[target].fp8 else "bf16")
    goal = Goal(target, replace(plan, precision=chosen), choose_flavour(flavour, None))
    require_target(goal.plan, target)
    return goal


def goals_here(
    plan: Plan, precision: Precision | None, flavour: str | None, progress: Progress
) -> list[Goal]:
    """The goal for this machine's GPU, with the same choices as a run. Empty without a GPU or a TensorRT for
    it, which is reported. Raises EnvironmentBroken where a flavour is asked for and cannot be used.
    """
    try:
        gpu = _gpu()
    except EnvironmentBroken as error:
        if flavour is not None:
            hint = "Leave --flavour out for graphs alone, or name a GPU, such as --target sm89."
            raise EnvironmentBroken(error.message, hint) from error
        progress(Note(f"Graphs only; engines need a GPU or --target. {error.message}", "graphs_only"))
        return []
    try:
        return [_current(gpu, plan, precision, flavour)]
    except EnvironmentBroken as error:
        if flavour is not None:
            raise
        progress(Note(f"Graphs only. {error.message} {error.hint}", "graphs_only"))
        return []


def _gpu(hint: str = "") -> Gpu:
    try:
        return Gpu()
    except EnvironmentBroken as error:
        raise EnvironmentBroken(error.message, hint) from error


def _current(gpu: Gpu, plan: Plan, precision: Precision | None, flavour: str | None) -> Goal:
    chosen = precision or best_precision(gpu.capability)
    require_fp8(chosen, gpu.capability)
    return Goal("current", replace(plan, precision=chosen), choose_flavour(flavour, gpu.capability), gpu)


def compile_goal(model: ModelConfig, goal: Goal, dry_run: bool, progress: Progress) -> CompileReport:
    """Builds a goal's engines. With `dry_run` it builds nothing and reports their states."""
    try:
        return compile_engines(
            model,
            goal.plan,
            goal.target,
            goal.flavour,
            progress,
            machine=goal.machine,
            missing=goal.missing,
            dry_run=dry_run,
        )
    except KeyboardInterrupt as stop:
        if not hasattr(stop, "__notes__"):  # else it was stopped among the graphs
            stop.add_note("Finished engines stay: the same command goes on from there.")
        raise


def tune_goal(
    model: ModelConfig, goal: Goal, report: CompileReport, measure: bool | None, progress: Progress
) -> list[Figure]:
    """Has the kernels of the built engines finished, and measures the candidates, on this machine's GPU.

    `measure`: True measures all candidates, None those without a figure, False none.
    """
    if goal.gpu is None:
        return []
    _finish(model, goal, goal.gpu, report, progress)
    return [] if measure is False else _measure(model, goal, goal.gpu, report, bool(measure), progress)


def _finish(model: ModelConfig, goal: Goal, gpu: Gpu, report: CompileReport, progress: Progress) -> None:
    made = {row.manifest.key for row in report.engines if row.manifest}
    if made:
        recipes = recipes_here(model, goal.plan, machine_of(gpu, goal.flavour)).values()
        finish_engines(gpu, (recipe for recipe in recipes if recipe.engine.key in made), progress)


def _measure(
    model: ModelConfig, goal: Goal, gpu: Gpu, report: CompileReport, again: bool, progress: Progress
) -> list[Figure]:
    """Measures the candidates, and reports the one that a run takes."""
    impossible = {(row.name, row.target): row.problem for row in report.engines if row.problem}

    def missing(candidate: Candidate) -> str | None:
        engine = candidate.engine
        sentence = impossible.get((engine.recipe, engine.target)) if engine else None
        return sentence or goal.missing(candidate)

    machine = machine_of(gpu, goal.flavour)
    try:
        figures = autotune(model, goal.plan, machine, gpu, missing, progress, again=again)
    except KeyboardInterrupt as stop:
        stop.add_note("Finished measurements stay: the same command goes on from there.")
        raise
    for figure in figures:
        if figure.chosen:
            text = f"{figure.network} = {figure.candidate} ({title(figure)})"
            progress(Note(f"{figure.chosen}: {text}"))
    return figures
