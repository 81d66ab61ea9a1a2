"""Every engine and kernel of this machine's GPU against its graph in float32 on the CPU: see check.py."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import ModelProto

from trt_wan.build.bisect import first_difference
from trt_wan.build.check import Checked, require_small, worst_first
from trt_wan.build.compare import (
    Given,
    SegmentRunner,
    Values,
    compare,
    differs_among,
    inputs,
    on_cpu,
    outputs_of,
    widened,
)
from trt_wan.build.compile import export_graphs
from trt_wan.build.float32_graph import in_float32, marked
from trt_wan.build.goals import Goal
from trt_wan.engines.choice.candidates import Candidate, Engine, candidates
from trt_wan.engines.choice.recipes import recipes_here
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.store.graphs import graph_set
from trt_wan.engines.tensorrt import compile_onnx
from trt_wan.errors import GraphError
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import CandidateStep, Progress
from trt_wan.runtime.opening.segments import open_segments
from trt_wan.runtime.segments.segment import Segment
from trt_wan.runtime.segments.tensorrt import EngineSegment


def check_engines(model: ModelConfig, goal: Goal, progress: Progress) -> list[Checked]:
    """Every candidate of every network on this machine's GPU, the worst first."""
    gpu, machine, plan = goal.gpu, goal.machine, goal.plan
    assert gpu is not None and machine is not None, goal
    require_small(plan)
    export_graphs(model, plan, progress)
    recipes = recipes_here(model, plan, machine)
    contracts = networks(model, plan)
    folder = graph_set(model, plan).require()

    def opened(row: Candidate) -> Segment:
        return open_segments({row.network: row}, model, plan, gpu, recipes, progress)[row.network]

    rows = []
    for number, (name, network) in enumerate(contracts.items(), 1):
        here = [row for row in candidates(name, plan.precision, machine) if goal.missing(row) is None]
        if not here:  # the tier of this network needs another precision or GPU
            continue
        case = _Case.of(onnx.load(folder / f"{name}.onnx"), network, gpu, goal.flavour)
        for row in here:
            progress(CandidateStep(name, row.name, number, len(contracts)))
            largest = tolerance(name, plan.precision, row.tier)
            try:
                segment = opened(row)
            except GraphError as error:  # an engine that cannot be built: a run takes another candidate
                problem = f"not built: {error.message}"
                rows.append(Checked(name, row.name, math.inf, largest, problem=problem))
            else:
                rows.append(case.check(row, segment, largest))
    return worst_first(rows)


@dataclass(frozen=True)
class _Case:
    """A network with its graph, its inputs, and the outputs of its graph in float32."""

    graph: ModelProto
    network: Network
    gpu: Gpu
    flavour: Flavour
    values: Values
    oracle: Values

    @classmethod
    def of(cls, graph: ModelProto, network: Network, gpu: Gpu, flavour: Flavour) -> "_Case":
        values = inputs(network)
        oracle = outputs_of(on_cpu(in_float32(graph)), widened(values))
        return cls(graph, network, gpu, flavour, values, oracle)

    def check(self, row: Candidate, segment: Segment, largest: float) -> Checked:
        wide = widened(self.values)
        runner = SegmentRunner(self.gpu, self.network, self.values, segment)
        found = compare(runner, Given("float32", wide, self.oracle), wide)
        layer = ""
        if not found <= largest:
            layer = row.name
            if row.engine == Engine(row.network):  # the engine of this graph, which can have other outputs
                case = (self.network, self.values, self.gpu, self.flavour)
                try:
                    layer = first_layer(self.graph, self.graph, *case, largest)
                except GraphError as error:
                    layer = f"a layer that was not found ({error.message})"
        return Checked(row.network, row.name, found, largest, layer)


def first_layer(
    graph: ModelProto,
    right: ModelProto,
    network: Network,
    values: Values,
    gpu: Gpu,
    flavour: Flavour,
    largest: float,
) -> str:
    """The first layer of the graph's engine that differs from the graph `right` in float32.

    The engine is built with intermediate results as outputs, which may change how TensorRT fuses layers.
    """
    types = _types(graph)

    def differs(some: Sequence[str]) -> bool:
        changed = marked(graph, list(some))
        plan = compile_onnx(flavour, changed.SerializeToString(), "current", lambda *step: None)
        trt = flavour.module
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        segment = EngineSegment(gpu.handle, trt, runtime, network.name, plan, Path("no kernels are kept"))
        shown = replace(network, outputs=tuple(types[name] for name in some))
        wide = widened(values)
        made = outputs_of(SegmentRunner(gpu, shown, values, segment), wide)
        wanted = outputs_of(on_cpu(in_float32(marked(right, list(some)))), wide)
        return differs_among(made, wanted, wide, largest)

    return first_difference(graph, types, differs)


def _types(graph: ModelProto) -> Mapping[str, Tensor]:
    """The tensors that an engine can have as outputs: no FP8, no integers, no conditions."""
    names = {int(onnx.TensorProto.FLOAT): "float32", int(onnx.TensorProto.BFLOAT16): "bfloat16"}
    found = {}
    for value in (*graph.graph.value_info, *graph.graph.output):
        kind = value.type.tensor_type
        if dtype := names.get(kind.elem_type):
            shape = tuple(dim.dim_value for dim in kind.shape.dim)
            found[value.name] = Tensor(value.name, shape, dtype)  # type: ignore[arg-type]
    return found
