"""Graphs to engines: puts every engine of a model and plan, for one target, into the store.

Engines that are there stay, and each one is in the store as soon as it is compiled: a build that was stopped
goes on where it was. torch is imported only if graphs have to be exported first.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trt_wan.engines.choice.candidates import SEGMENTS, Candidate, Engine, Machine, candidates
from trt_wan.engines.choice.choose import Missing
from trt_wan.engines.choice.recipes import (
    engine_names,
    engines_of,
    recipes,
    recipes_here,
    require_target,
)
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
from trt_wan.errors import GraphError, UsageError

State = Literal["there", "built", "missing", "impossible"]


@dataclass(frozen=True)
class EngineRow:
    """One line of the report. Seconds are those of its compilation, whenever that was."""

    name: str
    target: Target
    state: State
    manifest: Manifest | None  # None if it is not there
    problem: str = ""  # why it is impossible

    @property
    def seconds(self) -> float:
        return self.manifest.build_seconds if self.manifest else 0.0

    @property
    def bytes(self) -> int:
        return self.manifest.bytes if self.manifest else 0


@dataclass(frozen=True)
class CompileReport:
    engines: tuple[EngineRow, ...]
    missing_graphs: tuple[str, ...]  # which a build has to export first; of a dry run only
    seconds: float  # of this call, with graphs
    removed: int  # engines that made room


@dataclass(frozen=True)
class GraphDone:
    name: str
    seconds: float


@dataclass(frozen=True)
class EngineProgress:
    """The phase and its steps are TensorRT's."""

    name: str
    target: Target
    number: int  # of this engine, 1-based
    engines: int
    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class EngineDone:
    row: EngineRow
    number: int
    engines: int


BuildProgress = Callable[[GraphDone | EngineProgress | EngineDone], None]


def compile_engines(
    model: ModelConfig,
    plan: Plan,
    target: Target,
    flavour: Flavour,
    progress: BuildProgress,
    *,
    machine: Machine | None = None,
    missing: Missing = lambda candidate: None,
    dry_run: bool = False,
) -> CompileReport:
    """Builds what is missing or damaged. With `dry_run` nothing is built: the report says what is there.

    `machine` is the one that is there, for the target "current": it also gets the candidates that are built
    for another target. An engine that cannot be compiled ends the build with a GraphError, those before it
    are in the store; but where another candidate can take the network's place (`missing` says of which the
    library is not here) the report says why, and the build goes on.
    """
    start = time.perf_counter()
    assert (machine is not None) == (target == "current"), f"{target} on {machine}"
    require_target(plan, target)
    if not graph_set(model, plan).complete():
        if dry_run:  # without a graph's bytes there is no telling whether its engine is there
            wanted = _wanted(model, plan, target, machine)
            rows = tuple(EngineRow(engine.recipe, engine.target, "missing", None) for engine in wanted)
            return CompileReport(rows, tuple(networks(model, plan)), time.perf_counter() - start, 0)
        _export(model, plan, progress)
    if machine is not None:
        made = recipes_here(model, plan, machine)
    else:
        made = {Engine(name, target): r for name, r in recipes(model, plan, target, flavour).items()}
    if dry_run:
        rows = tuple(_look(recipe) for recipe in made.values())
        return CompileReport(rows, (), time.perf_counter() - start, 0)
    places = _places(plan, machine)
    spared = {row.engine for rows in places for row in rows}
    errors: dict[Engine, GraphError] = {}
    before = {entry.key for entry in entries()}
    rows = tuple(
        _make(engine, recipe, (number, made), errors if engine in spared else None, progress)
        for number, (engine, recipe) in enumerate(made.items(), 1)
    )
    _require_others(places, missing, errors)
    trim({recipe.engine.key for recipe in made.values()})
    removed = before - {entry.key for entry in entries()}
    return CompileReport(rows, (), time.perf_counter() - start, len(removed))


def _wanted(model: ModelConfig, plan: Plan, target: Target, machine: Machine | None) -> tuple[Engine, ...]:
    if machine is not None:
        return engines_of(model, plan, machine)
    return tuple(Engine(name, target) for name in engine_names(model, plan))


def _look(recipe: Recipe) -> EngineRow:
    engine, manifest = recipe.engine, find(recipe.engine)
    return EngineRow(engine.network, engine.target, "there" if manifest else "missing", manifest)


def _make(
    engine: Engine,
    recipe: Recipe,
    place: tuple[int, Mapping[Engine, Recipe]],
    errors: dict[Engine, GraphError] | None,
    progress: BuildProgress,
) -> EngineRow:
    """`place` is the engine's number and all recipes of the build. An error that does not end the build is
    put into `errors`.
    """
    name, target = recipe.engine.network, recipe.engine.target
    count = (place[0], len(place[1]))
    spare = {other.engine.key for other in place[1].values()}

    def step(phase: str, done: int, steps: int) -> None:
        progress(EngineProgress(name, target, *count, phase, done, steps))

    try:
        manifest, built = ensure(recipe.engine, lambda: recipe.compile(step), spare)
        row = EngineRow(name, target, "built" if built else "there", manifest)
    except GraphError as error:
        if errors is None:
            raise
        errors[engine] = error
        row = EngineRow(name, target, "impossible", None, error.message)
    progress(EngineDone(row, *count))
    return row


def _places(plan: Plan, machine: Machine | None) -> list[tuple[Candidate, ...]]:
    """The candidates for every place that has several; no others may fail."""
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
            others = [row for row in there if failed.tier in ("fast", row.tier)]
            error = errors.get(failed.engine) if failed.engine else None
            if error is not None and not others:
                raise error


def _export(model: ModelConfig, plan: Plan, progress: BuildProgress) -> None:
    try:
        from trt_wan.build.graphs import build_graphs

        build_graphs(model, plan, lambda name, seconds: progress(GraphDone(name, seconds)))
    except ImportError as error:  # torch imports onnxscript only when it exports
        raise UsageError(
            f"Exporting graphs needs packages that are not here ({error}).",
            "Run: pip install 'trt-wan[build]'",
        ) from error
