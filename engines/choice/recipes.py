"""The engines of a model and plan, each with its recipe: from its ONNX graph, or layer by layer.

`trt-wan build` makes all engines ahead. With TensorRT-RTX, which needs less than a second for one, a run
makes missing ones itself. A recipe needs the exported graphs only: no torch, no weights, for named targets no
GPU.
"""

import hashlib
from functools import partial

from trt_wan.engines.choice.candidates import ATTENTION_FP8, Engine, Machine, candidates, has_engine
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import FP8_ATTENTION_RANGE, TARGETS, GpuKind, Target
from trt_wan.engines.lynx import FacePlan
from trt_wan.engines.precision import PRECISIONS
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import EngineId, Recipe, wan_engine
from trt_wan.engines.store.graphs import require_graphs
from trt_wan.engines.tensorrt import compile_attention, compile_onnx
from trt_wan.errors import UsageError


def engine_names(model: ModelConfig, plan: Plan) -> tuple[str, ...]:
    """The engines that a build makes: one per network that TensorRT computes, and the candidates that are
    built without a graph.
    """
    names = tuple(filter(has_engine, networks(model, plan)))
    in_steps = "attention" in names and not isinstance(plan, FacePlan)
    return (*names, ATTENTION_FP8) if PRECISIONS[plan.precision].fp8 and in_steps else names


def engines_of(model: ModelConfig, plan: Plan, machine: Machine) -> tuple[Engine, ...]:
    """An engine of every network for the machine's GPU, and candidates that are built for another target. A
    network that TensorRT does not compute has one for its graph alone.
    """
    rows = [row for name in networks(model, plan) for row in candidates(name, plan.precision, machine)]
    guests = [row.engine for row in rows if row.engine is not None and row.engine.target != "current"]
    names = dict.fromkeys((*networks(model, plan), *engine_names(model, plan)))
    return (*map(Engine, names), *guests)


def require_target(plan: Plan, target: Target) -> None:
    """Raises UsageError if GPUs of that target cannot run the plan's precision."""
    if PRECISIONS[plan.precision].fp8 and not TARGETS[target].fp8:
        raise UsageError(f"GPUs of target {target} have no FP8.", "Use --precision bf16.")


def recipes(
    model: ModelConfig, plan: Plan, target: Target, flavour: Flavour, gpu: GpuKind | None = None
) -> dict[str, Recipe]:
    """The recipe of every network's engine by name. Raises GraphError if the graphs are not exported."""
    require_target(plan, target)
    graphs = require_graphs(model, plan)

    def engine(name: str, source: bytes) -> EngineId:
        digest = hashlib.sha256(source).hexdigest()
        return wan_engine(name, model.name, plan, digest, target, flavour, gpu)

    found = {}
    for name in networks(model, plan):
        graph = (graphs / f"{name}.onnx").read_bytes()
        found[name] = Recipe(engine(name, graph), partial(compile_onnx, flavour, graph, target))
    if ATTENTION_FP8 in engine_names(model, plan):
        c = model.transformer
        shape = (plan.attended_heads(c.heads), plan.undivided.tokens, c.head_dim)
        source = f"{ATTENTION_FP8} {shape} {FP8_ATTENTION_RANGE}".encode()
        found[ATTENTION_FP8] = Recipe(
            engine(ATTENTION_FP8, source), partial(compile_attention, flavour, *shape, True, target)
        )
    return found


def recipes_here(model: ModelConfig, plan: Plan, machine: Machine) -> dict[Engine, Recipe]:
    """The recipe of every engine that the machine's GPU may use."""
    wanted = engines_of(model, plan, machine)
    by_target = {
        target: recipes(model, plan, target, machine.flavour, machine.gpu if target == "current" else None)
        for target in dict.fromkeys(engine.target for engine in wanted)
    }
    return {engine: by_target[engine.target][engine.recipe] for engine in wanted}
