"""`trt-wan build --sam2`: SAM2's graphs, and engines for the GPU that is there or for named ones.

The graphs are for ONNX Runtime, in fp32, and, where engines are built, for those, in fp16 and for a batch of
frames. What is there already stays.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_wan.cli.command import note
from trt_wan.cli.report import EngineReady, EngineStep, Report, Result, table
from trt_wan.errors import EnvironmentBroken, UsageError

if TYPE_CHECKING:
    from trt_wan.engines.flavour import Flavour
    from trt_wan.engines.gpu import Target
    from trt_wan.engines.sam2.config import Sam2Config, Sam2Plan
    from trt_wan.preprocess.sam2.engine import Sam2Engine
    from trt_wan.runtime.device.gpu import Gpu

Data = dict[str, Any]


@dataclass(frozen=True)
class Sam2Goal:
    target: "Target"
    flavour: "Flavour"
    gpu: "Gpu | None"  # for the target "current", and only then


def build_sam2_for(
    report: Report, which: str, targets: "Sequence[Target]", flavour: str | None, dry_run: bool
) -> tuple[Result, Data]:
    """The result and the data of `trt-wan build --sam2 WHICH`, a model's name or a weights file."""
    from trt_wan.engines.sam2.config import Sam2Plan
    from trt_wan.engines.store import engines as engine_store
    from trt_wan.preprocess.sam2.model import GPU_PLAN

    start = time.perf_counter()
    config = named_model(which)
    goals = [_goal(target, flavour) for target in targets] if targets else _here(report, flavour)
    plans = (Sam2Plan(), *((GPU_PLAN,) if goals else ()))
    exported = [name for plan in plans for name in _graphs(report, config, plan, dry_run)]
    engines = [row for goal in goals for row in _engines(report, config, goal, dry_run)]
    data = {
        "missing_graphs" if dry_run else "graphs": exported if dry_run else len(exported),
        "engines": engines,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if dry_run:
        rows = [("graph", name, "would be exported") for name in exported]
        rows += [("engine", f"{row['name']}, {row['target']}", row["state"]) for row in engines]
        return table([("WHAT", "NAME", "STATE"), *rows]), data
    return engine_store.folder() if goals else _folder(config, plans[0]), data


def named_model(which: str) -> "Sam2Config":
    """A model by its name, in which sam2.1_ may be left out, or by its weights. UsageError, WeightsError."""
    from trt_wan.engines.sam2.config import SAM2_MODELS

    for name in (which, f"sam2.1_{which}"):
        if name in SAM2_MODELS:
            return SAM2_MODELS[name]
    if not Path(which).exists():
        raise UsageError(
            f"{which} is no file and no SAM2 model.", f"The models are {', '.join(SAM2_MODELS)}."
        )
    from trt_wan.preprocess.sam2.weights import load_sam2

    return load_sam2(Path(which)).config


def _goal(target: "Target", flavour: str | None) -> Sam2Goal:
    from trt_wan.engines.flavour import choose_flavour
    from trt_wan.runtime.device.gpu import Gpu

    if target != "current":
        return Sam2Goal(target, choose_flavour(flavour, None), None)
    gpu = Gpu()
    return Sam2Goal("current", choose_flavour(flavour, gpu.capability), gpu)


def _here(report: Report, flavour: str | None) -> list[Sam2Goal]:
    try:
        return [_goal("current", flavour)]
    except EnvironmentBroken as error:
        if flavour is not None:
            raise
        note(report, f"Graphs only; engines need a GPU or --target. {error.message}")
        return []


def _folder(config: "Sam2Config", plan: "Sam2Plan") -> Path:
    from trt_wan.engines.sam2.contracts import graphs_folder

    return graphs_folder(config, plan)


def _graphs(report: Report, config: "Sam2Config", plan: "Sam2Plan", dry_run: bool) -> list[str]:
    """Those that had to be exported, or would be; torch is imported only for that."""
    from trt_wan.engines.sam2.contracts import networks
    from trt_wan.engines.store.graphs import holds

    contracts = networks(config, plan)
    if holds(_folder(config, plan), contracts):
        return []
    if dry_run:
        return [f"{name}, {plan.precision}" for name in contracts]
    made: list[str] = []

    def exported(name: str, seconds: float) -> None:
        made.append(name)
        note(report, f"exported {name}, {plan.precision}, in {seconds:.1f} s")

    try:
        from trt_wan.build.sam2 import build_sam2_graphs

        build_sam2_graphs(config, plan, exported)
    except ImportError as error:  # torch imports onnxscript only when it exports
        raise UsageError(
            f"Exporting graphs needs packages that are not here ({error}).",
            "Run: pip install 'trt-wan[build]'",
        ) from error
    return made


def _engines(report: Report, config: "Sam2Config", goal: Sam2Goal, dry_run: bool) -> list[Data]:
    from trt_wan.engines.gpu import GpuKind
    from trt_wan.engines.sam2.contracts import networks
    from trt_wan.engines.store import engines as engine_store
    from trt_wan.engines.tensorrt import compile_onnx
    from trt_wan.preprocess.sam2.engine import engine_of
    from trt_wan.preprocess.sam2.model import GPU_PLAN
    from trt_wan.runtime.opening.segments import kernel_cache
    from trt_wan.runtime.segments.tensorrt import finish_kernels

    folder, flavour, gpu = _folder(config, GPU_PLAN), goal.flavour, goal.gpu
    kind = None if gpu is None else GpuKind(gpu.name, gpu.driver)
    note(report, f"{goal.target}: {GPU_PLAN.precision}, {flavour.name} {flavour.version} ({flavour.reason})")
    names = list(networks(config, GPU_PLAN))
    found: list[Data] = []
    made: dict[str, Sam2Engine] = {}
    for number, name in enumerate(names, 1):
        path = folder / f"{name}.onnx"
        if not path.exists():  # a dry run before the first build
            found.append({"name": name, "target": goal.target, "state": "would be built"})
            continue
        graph = path.read_bytes()
        engine = engine_of(config, name, graph, goal.target, flavour, kind)
        if dry_run:
            state = "would be built" if engine_store.find(engine) is None else "there"
            found.append({"name": name, "target": goal.target, "state": state, "key": engine.key})
            continue

        def step(phase: str, step: int, steps: int, name: str = name, number: int = number) -> None:
            report.progress(EngineStep(goal.target, name, number, len(names), phase, step, steps))

        manifest, built = engine_store.ensure(
            engine, partial(compile_onnx, flavour, graph, goal.target, step)
        )
        state, seconds = "built" if built else "there", manifest.build_seconds
        report.progress(EngineReady(goal.target, name, number, len(names), state, seconds, manifest.bytes))
        made[name] = engine
        found.append(
            {"name": name, "target": goal.target, "state": state, "seconds": seconds}
            | {"bytes": manifest.bytes, "key": engine.key}
        )
    if made:
        engine_store.trim({engine.key for engine in made.values()})
    if made and gpu is not None:
        plans = {name: engine_store.open_checked(engine) for name, engine in made.items()}
        finish_kernels(flavour, plans, kernel_cache(flavour), report.progress)
    return found
