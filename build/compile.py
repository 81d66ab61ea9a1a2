"""Compiles every engine of a model and plan, for one target, into the store.

Existing engines stay, and each new one is stored as soon as it is compiled: a build that was stopped goes on
with the next. torch is imported only to export missing graphs.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trt_wan.engines.choice.candidates import (
    SEGMENTS,
    Candidate,
    Engine,
    Machine,
    candidates,
    has_engine,
    may_use,
)
from trt_wan.engines.choice.choose import Missing
from trt_wan.engines.choice.recipes import engine_names, engines_of, recipes, recipes_here, require_target
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import Target
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import Recipe
from trt_wan.engines.store.engines import ensure, find
from trt_wan.engines.store.entries import entries, trim
from trt_wan.engines.store.graphs import graph_set
from trt_wan.engines.store.manifest import Manifest
from trt_wan.errors import GraphError, UsageError, with_commands
from trt_wan.install import install_command
from trt_wan.runtime.events import EngineReady, EngineStep, GraphExported, Progress, reports_waiting

State = Literal["there", "built", "missing", "impossible"]


@dataclass(frozen=True)
class EngineRow:
    """An engine of the report. `seconds` is the time of its compilation, also of an earlier one."""

    name: str
    target: Target
    state: State
    manifest: Manifest | None  # None for an engine that is not in the store
    problem: str = ""  # the reason why it is impossible

    @property
    def seconds(self) -> float:
        return self.manifest.build_seconds if self.manifest else 0.0

    @property
    def bytes(self) -> int:
        return self.manifest.bytes if self.manifest else 0


@dataclass(frozen=True)
class CompileReport:
    engines: tuple[EngineRow, ...]
    missing_graphs: tuple[str, ...] = ()  # in a dry run: a build exports them first
    graphs: int = 0  # exported by this call
    seconds: float = 0.0  # the duration of this call, with graphs
    removed: int = 0  # engines that made room


def compile_engines(
    model: ModelConfig,
    plan: Plan,
    target: Target,
    flavour: Flavour,
    progress: Progress,
    *,
    machine: Machine | None = None,
    missing: Missing = lambda candidate: None,
    dry_run: bool = False,
) -> CompileReport:
    """Builds missing and damaged engines. With `dry_run` it builds nothing and reports their states.

    `machine` is this machine, for the target "current": its candidates for other targets are built too.
    Raises GraphError for an engine that cannot be compiled, unless another candidate can take the network's
    place: then the report holds the reason. `missing` says why a candidate cannot be used. Earlier engines
    are in the store.
    """
    start = time.perf_counter()
    assert (machine is not None) == (target == "current"), f"{target} on {machine}"
    require_target(plan, target)
    exported = 0
    if lacking := graph_set(model, plan).missing():
        if dry_run:  # an engine's key needs the bytes of its graph
            wanted = _wanted(model, plan, target, machine)
            rows = tuple(EngineRow(engine.recipe, engine.target, "missing", None) for engine in wanted)
            return CompileReport(rows, lacking)
        exported = export_graphs(model, plan, progress)
    if machine is not None:
        made = recipes_here(model, plan, machine)
    else:
        made = {Engine(name, target): r for name, r in recipes(model, plan, target, flavour).items()}
    made = {engine: recipe for engine, recipe in made.items() if has_engine(engine.recipe)}
    if dry_run:
        return CompileReport(tuple(_look(recipe) for recipe in made.values()))
    places = _places(plan, machine)
    optional = {name for name, network in networks(model, plan).items() if network.optional}
    spared = {row.engine for rows in places for row in rows}
    spared |= {engine for engine in made if engine.recipe in optional}
    errors: dict[Engine, GraphError] = {}
    before = {entry.key for entry in entries()}
    rows = tuple(
        _make(engine, recipe, (number, made), errors if engine in spared else None, progress)
        for number, (engine, recipe) in enumerate(made.items(), 1)
    )
    _require_others(places, missing, errors)
    trim({recipe.engine.key for recipe in made.values()})
    removed = before - {entry.key for entry in entries()}
    return CompileReport(rows, (), exported, time.perf_counter() - start, len(removed))


def export_graphs(model: ModelConfig, plan: Plan, progress: Progress) -> int:
    """Exports the graphs that are missing, and returns their number. Raises UsageError without torch."""
    missing = len(graph_set(model, plan).missing())
    if not missing:
        return 0
    made: list[str] = []

    def exported(name: str, seconds: float) -> None:
        made.append(name)
        progress(GraphExported(name, len(made), max(missing, len(made)), seconds))

    try:
        from trt_wan.build.graphs import build_graphs

        build_graphs(model, plan, exported, reports_waiting(progress))
    except ImportError as error:  # torch imports onnxscript only when it exports
        raise UsageError(
            f"Exporting graphs needs packages that are not here ({error}).",
            with_commands("Run:", install_command("build")),
        ) from error
    return len(made)


def _wanted(model: ModelConfig, plan: Plan, target: Target, machine: Machine | None) -> tuple[Engine, ...]:
    if machine is not None:
        return tuple(engine for engine in engines_of(model, plan, machine) if has_engine(engine.recipe))
    return tuple(Engine(name, target) for name in engine_names(model, plan))


def _look(recipe: Recipe) -> EngineRow:
    engine, manifest = recipe.engine, find(recipe.engine)
    return EngineRow(engine.network, engine.target, "there" if manifest else "missing", manifest)


def _make(
    engine: Engine,
    recipe: Recipe,
    place: tuple[int, Mapping[Engine, Recipe]],
    errors: dict[Engine, GraphError] | None,
    progress: Progress,
) -> EngineRow:
    """`place` is the engine's number and all recipes of the build. An error that does not end the build is
    put into `errors`.
    """
    number, made = place
    name, target = recipe.engine.network, recipe.engine.target

    def step(phase: str, done: int, steps: int) -> None:
        progress(EngineStep(target, name, number, len(made), phase, done, steps))

    keys = [other.engine.key for other in made.values()]
    try:
        manifest, built = ensure(recipe.engine, lambda: recipe.compile(step), keys, reports_waiting(progress))
        row = EngineRow(name, target, "built" if built else "there", manifest)
    except GraphError as error:
        if errors is None:
            raise
        errors[engine] = error
        row = EngineRow(name, target, "impossible", None, error.message)
    progress(EngineReady(target, name, number, len(made), row.state, row.seconds, row.bytes, row.problem))
    return row


def _places(plan: Plan, machine: Machine | None) -> list[tuple[Candidate, ...]]:
    """The candidates for every place that has several; no other engine may fail."""
    if machine is None:
        return []
    every = [candidates(network, plan.precision, machine) for network in SEGMENTS]
    return [rows for rows in every if len(rows) > 1]


def _require_others(
    places: Sequence[Sequence[Candidate]], missing: Missing, errors: Mapping[Engine, GraphError]
) -> None:
    """Raises the first of `errors` that leaves a place empty in a tier."""
    for rows in places:
        there = [row for row in rows if row.engine not in errors and missing(row) is None]
        for failed in rows:
            others = [row for row in there if may_use(failed.tier, row.tier)]
            error = errors.get(failed.engine) if failed.engine else None
            if error is not None and not others:
                raise error
