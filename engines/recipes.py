"""The engines of a model and plan, and how each is made: from its ONNX graph, or layer by layer.

`trt-wan build` makes all of them ahead; with TensorRT-RTX, which takes less than a second for one, a run can
make what is missing itself. The graphs have to be there, nothing else: no torch, no weights, for named
targets no GPU.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.engine_id import EngineId, GpuKind
from trt_wan.engines.plan import Plan
from trt_wan.engines.precision import PRECISIONS
from trt_wan.engines.store import require_graphs
from trt_wan.engines.tensorrt import (
    FP8_ATTENTION_RANGE,
    TARGETS,
    Flavour,
    Progress,
    Target,
    compile_attention,
    compile_onnx,
)
from trt_wan.errors import UsageError

ATTENTION_FP8 = "attention_fp8"  # the contract `attention`, computed in FP8: a candidate for its place


@dataclass(frozen=True)
class Recipe:
    engine: EngineId
    compile: Callable[[Progress], bytes]


def engine_names(model: ModelConfig, plan: Plan) -> tuple[str, ...]:
    """One engine per network, and candidates that have no graph of their own."""
    return (*networks(model, plan), *((ATTENTION_FP8,) if PRECISIONS[plan.precision].fp8 else ()))


def require_target(plan: Plan, target: Target) -> None:
    """UsageError if GPUs of that target cannot run the plan's precision."""
    if PRECISIONS[plan.precision].fp8 and not TARGETS[target].fp8:
        raise UsageError(f"GPUs of target {target} have no FP8.", "Use --precision bf16.")


def recipes(
    model: ModelConfig, plan: Plan, target: Target, flavour: Flavour, gpu: GpuKind | None = None
) -> dict[str, Recipe]:
    """The recipe of every engine by name; GraphError if the graphs are not exported."""
    require_target(plan, target)
    graphs = require_graphs(model, plan)

    def engine(name: str, source: bytes) -> EngineId:
        digest = hashlib.sha256(source).hexdigest()
        return EngineId(name, model.name, plan, digest, target, flavour, gpu)

    found = {}
    for name in networks(model, plan):
        graph = (graphs / f"{name}.onnx").read_bytes()
        found[name] = Recipe(engine(name, graph), partial(compile_onnx, flavour, graph, target))
    if ATTENTION_FP8 in engine_names(model, plan):
        c = model.transformer
        shape = (c.heads, plan.tokens, c.head_dim)
        source = f"{ATTENTION_FP8} {shape} {FP8_ATTENTION_RANGE}".encode()
        found[ATTENTION_FP8] = Recipe(
            engine(ATTENTION_FP8, source), partial(compile_attention, flavour, *shape, True, target)
        )
    return found
