"""`trt-wan build --sam2`: SAM2's graphs, and engines for the GPU of this machine or for named ones.

ONNX Runtime takes graphs in fp32; engines are built from graphs in fp16 for a batch of frames. Graphs and
engines that exist are not made again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_wan.cli.command import note
from trt_wan.cli.report import Report, Result, table
from trt_wan.errors import EnvironmentBroken, UsageError, with_commands
from trt_wan.install import install_command
from trt_wan.runtime.events import EngineReady, EngineStep, reports_waiting

if TYPE_CHECKING:
    from trt_wan.engines.flavour import Flavour
    from trt_wan.engines.gpu import Target
    from trt_wan.engines.sam2.config import Sam2Config, Sam2Plan
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
    from trt_wan.engines.sam2.recipes import graph_set
    from trt_wan.engines.store.manifest import folder
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
    return folder() if goals else graph_set(config, plans[0]).folder, data


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


def _graphs(report: Report, config: "Sam2Config", plan: "Sam2Plan", dry_run: bool) -> list[str]:
    """The graphs that had to be exported, or would be; torch is imported only for that."""
    from trt_wan.engines.sam2.recipes import graph_set

    missing = graph_set(config, plan).missing()
    if not missing:
        return []
    if dry_run:
        return [f"{name}, {plan.precision}" for name in missing]
    made: list[str] = []

    def exported(name: str, seconds: float) -> None:
        made.append(name)
        note(report, f"exported {name}, {plan.precision}, in {seconds:.1f} s")

    try:
        from trt_wan.build.sam2 import build_sam2_graphs

        build_sam2_graphs(config, plan, exported, reports_waiting(report.progress))
    except ImportError as error:  # torch imports onnxscript only when it exports
        raise UsageError(
            f"Exporting graphs needs packages that are not here ({error}).",
            with_commands("Run:", install_command("build")),
        ) from error
    return made


def _engines(report: Report, config: "Sam2Config", goal: Sam2Goal, dry_run: bool) -> list[Data]:
    from trt_wan.engines.gpu import GpuKind
    from trt_wan.engines.sam2.recipes import graph_set, recipes
    from trt_wan.engines.store.engines import ensure, find
    from trt_wan.preprocess.sam2.model import GPU_PLAN
    from trt_wan.runtime.segments.tensorrt import finish_engines

    flavour, gpu = goal.flavour, goal.gpu
    note(report, f"{goal.target}: {GPU_PLAN.precision}, {flavour.name} {flavour.version} ({flavour.reason})")
    graphs = graph_set(config, GPU_PLAN)
    if dry_run and not graphs.complete():
        blank = {"target": goal.target, "state": "would be built"}
        return [{"name": name, **blank} for name in graphs.names]
    kind = None if gpu is None else GpuKind(gpu.name, gpu.driver)
    made = recipes(config, GPU_PLAN, goal.target, flavour, kind)
    keys = [recipe.engine.key for recipe in made.values()]
    found: list[Data] = []
    for number, (name, recipe) in enumerate(made.items(), 1):
        row: Data = {"name": name, "target": goal.target, "key": recipe.engine.key}
        if dry_run:
            state = "would be built" if find(recipe.engine) is None else "there"
            found.append({**row, "state": state})
            continue

        def step(phase: str, step: int, steps: int, name: str = name, number: int = number) -> None:
            report.progress(EngineStep(goal.target, name, number, len(made), phase, step, steps))

        waiting = reports_waiting(report.progress)
        manifest, built = ensure(recipe.engine, partial(recipe.compile, step), keys, waiting)
        state, seconds, size = "built" if built else "there", manifest.build_seconds, manifest.bytes
        report.progress(EngineReady(goal.target, name, number, len(made), state, seconds, size))
        found.append({**row, "state": state, "seconds": seconds, "bytes": size})
    if gpu is not None and not dry_run:
        finish_engines(gpu, made.values(), report.progress)
    return found
