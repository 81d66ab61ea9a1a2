"""SAM2's graphs and engines in the store, beside those of the video model."""

import hashlib
from functools import partial

from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import GpuKind, Target
from trt_wan.engines.sam2.config import Sam2Config, Sam2Plan
from trt_wan.engines.sam2.contracts import GRAPHS_VERSION, networks
from trt_wan.engines.store.engine_id import EngineId, Recipe
from trt_wan.engines.store.graphs import GraphSet, named_folder
from trt_wan.engines.tensorrt import compile_onnx


def build_command(model: str) -> tuple[str, ...]:
    """The arguments of trt-wan that export and compile a model."""
    return ("build", "--sam2", model)


def graph_set(config: Sam2Config, plan: Sam2Plan) -> GraphSet:
    name = f"{config.name}-{config.image_size}-{plan.precision}"
    return GraphSet(
        named_folder(name, config, plan, GRAPHS_VERSION),
        tuple(networks(config, plan)),
        f"{config.name}, {plan.precision}, batch {plan.batch}",
        build_command(config.name),
    )


def recipes(
    config: Sam2Config, plan: Sam2Plan, target: Target, flavour: Flavour, gpu: GpuKind | None
) -> dict[str, Recipe]:
    """The recipe of every engine by its network. Raises GraphError if the graphs are not exported."""
    graphs = graph_set(config, plan).require()
    named = () if target == "current" else ("--target", target)
    rebuild = (*build_command(config.name), *named, "--flavour", flavour.name)
    about = f"{config.name}, {config.image_size}x{config.image_size}"
    found = {}
    for name in networks(config, plan):
        graph = (graphs / f"{name}.onnx").read_bytes()
        source = hashlib.sha256(graph).hexdigest()
        engine = EngineId("sam2", name, about, plan.precision, rebuild, source, target, flavour, gpu)
        found[name] = Recipe(engine, partial(compile_onnx, flavour, graph, target))
    return found
