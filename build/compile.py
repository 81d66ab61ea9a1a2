"""Graphs to engines: puts every engine of a model and plan, for one target, into the store.

Engines that are there stay, and each one is in the store as soon as it is compiled: a build that was stopped
goes on where it was. torch is imported only if graphs have to be exported first.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.engine_id import GpuKind
from trt_wan.engines.engine_store import Manifest, ensure, find, trim
from trt_wan.engines.plan import Plan
from trt_wan.engines.recipes import Recipe, engine_names, recipes, require_target
from trt_wan.engines.store import graphs_folder, is_complete
from trt_wan.engines.tensorrt import Flavour, Target
from trt_wan.errors import UsageError

State = Literal["there", "built", "missing"]


@dataclass(frozen=True)
class EngineRow:
    """One line of the report. Seconds are those of its compilation, whenever that was."""

    name: str
    state: State
    manifest: Manifest | None  # None if it is missing

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
    gpu: GpuKind | None = None,
    dry_run: bool = False,
) -> CompileReport:
    """Builds what is missing or damaged. With `dry_run` nothing is built: the report says what is there.

    `gpu` is the one that is there, for the target "current". An engine that cannot be compiled ends the build
    with a GraphError; those before it are in the store.
    """
    start = time.perf_counter()
    require_target(plan, target)
    if not is_complete(graphs_folder(model, plan), model, plan):
        if dry_run:  # without a graph's bytes there is no telling whether its engine is there
            missing = tuple(EngineRow(name, "missing", None) for name in engine_names(model, plan))
            return CompileReport(missing, tuple(networks(model, plan)), time.perf_counter() - start, 0)
        _export(model, plan, progress)
    made = list(recipes(model, plan, target, flavour, gpu).values())
    if dry_run:
        rows = tuple(_look(recipe) for recipe in made)
        return CompileReport(rows, (), time.perf_counter() - start, 0)
    rows = tuple(_make(recipe, number, len(made), progress) for number, recipe in enumerate(made, 1))
    removed = trim({recipe.engine.key for recipe in made})
    return CompileReport(rows, (), time.perf_counter() - start, len(removed))


def _look(recipe: Recipe) -> EngineRow:
    manifest = find(recipe.engine)
    return EngineRow(recipe.engine.network, "there" if manifest else "missing", manifest)


def _make(recipe: Recipe, number: int, engines: int, progress: BuildProgress) -> EngineRow:
    name = recipe.engine.network

    def step(phase: str, done: int, steps: int) -> None:
        progress(EngineProgress(name, number, engines, phase, done, steps))

    manifest, built = ensure(recipe.engine, lambda: recipe.compile(step))
    row = EngineRow(name, "built" if built else "there", manifest)
    progress(EngineDone(row, number, engines))
    return row


def _export(model: ModelConfig, plan: Plan, progress: BuildProgress) -> None:
    try:
        from trt_wan.build.graphs import build_graphs

        build_graphs(model, plan, lambda name, seconds: progress(GraphDone(name, seconds)))
    except ImportError as error:  # torch imports onnxscript only when it exports
        raise UsageError(
            f"Exporting graphs needs packages that are not here ({error}).",
            "Run: pip install 'trt-wan[build]'",
        ) from error
