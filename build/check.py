"""`trt-wan build --check`: engines and kernels against ONNX Runtime, or without a GPU graphs against torch.

Both sides take the same seeded inputs through polygraphy's Comparator. On a GPU the reference is ONNX Runtime
on the CPU, which runs the engine's own graph with all numbers in float32 (float32_graph.py): FP8 weights
count as the numbers that they stand for. Without a GPU ONNX Runtime runs the exported float32 graph, and
torch is the reference. A failure is traced to the first layer that differs (bisect.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx
from onnx import ModelProto

from trt_wan.build.bisect import first_difference
from trt_wan.build.compare import (
    Given,
    Open,
    SegmentRunner,
    Values,
    compare,
    difference,
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
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import Recipe
from trt_wan.engines.store.graphs import graph_set
from trt_wan.errors import GraphError, UsageError
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import CandidateStep, Progress
from trt_wan.runtime.opening.segments import open_segments
from trt_wan.runtime.segments.segment import Segment

CHECK_SIZE, CHECK_WINDOW = (128, 128), 9  # 256 tokens
MOST_TOKENS = 2048  # the 14B's reference takes about a minute; attention's scores are 0.7 GB
CPU_TOLERANCE = 1e-4  # float32 in another order of summation: at most 2e-6 measured with the tiny model


@dataclass(frozen=True)
class Checked:
    """One comparison. `layer` is the first node of the graph that differs, if the comparison failed."""

    network: str
    computed_by: str
    error: float  # relative; infinite where a number is not finite
    tolerance: float
    layer: str = ""
    problem: str = ""  # the reason why there is no comparison

    @property
    def right(self) -> bool:
        return not self.problem and self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        if self.problem:
            return self.problem
        return "ok" if self.right else f"differs, first at {self.layer}"


def require_right(checked: Sequence[Checked]) -> None:
    """Raises GraphError, which names the layer, if a comparison failed."""
    wrong = [row for row in checked if not row.right and not row.problem]
    if wrong:
        names = [f"{row.network} by {row.computed_by} at {row.layer}" for row in wrong]
        raise GraphError(
            f"{len(wrong)} of {len(checked)} comparisons differ: {'; '.join(names[:5])}.",
            "Build the engines again; if they differ still, please report it with the table.",
        )


# --- without a GPU -----------------------------------------------------------------------------------------


def check_graphs(model: ModelConfig, plan: Plan, progress: Progress) -> list[Checked]:
    """The graphs on ONNX Runtime against their functions in torch, the worst first. Raises UsageError."""
    if plan.precision != "fp32":
        raise UsageError(
            f"ONNX Runtime on the CPU runs fp32, not {plan.precision}.", "Leave --precision out."
        )
    _require_small(plan)
    export_graphs(model, plan, progress)
    folder = graph_set(model, plan).require()
    contracts = networks(model, plan)
    rows = []
    for number, (name, network) in enumerate(contracts.items(), 1):
        progress(CandidateStep(name, "onnxruntime", number, len(contracts)))
        rows.append(check_graph(onnx.load(folder / f"{name}.onnx"), network, model, plan))
    return _worst_first(rows)


def check_graph(graph: ModelProto, network: Network, model: ModelConfig, plan: Plan) -> Checked:
    """The comparison of one graph with its function in torch."""
    from trt_wan.build.torch_values import torch_outputs, torch_values

    values = inputs(network)
    reference = Given("torch", values, torch_outputs(network, model, plan, values))
    found = compare(on_cpu(graph), reference, values)
    layer = ""
    if not found <= CPU_TOLERANCE:
        computed = torch_values(network, model, plan, values)

        def differs(some: Sequence[str]) -> bool:
            made = outputs_of(on_cpu(marked(graph, list(some))), values)
            return any(difference(made[name], computed[name]) > CPU_TOLERANCE for name in some)

        layer = first_difference(graph, computed, differs)
    return Checked(network.name, "onnxruntime", found, CPU_TOLERANCE, layer)


# --- on a GPU ----------------------------------------------------------------------------------------------


def check_engines(model: ModelConfig, goal: Goal, progress: Progress) -> list[Checked]:
    """Every candidate of every network on this machine's GPU against float32, the worst first."""
    gpu, machine, plan = goal.gpu, goal.machine, goal.plan
    assert gpu is not None and machine is not None, goal
    _require_small(plan)
    export_graphs(model, plan, progress)
    recipes = recipes_here(model, plan, machine)
    contracts = networks(model, plan)
    folder = graph_set(model, plan).require()
    rows = []
    for number, (name, network) in enumerate(contracts.items(), 1):
        graph = onnx.load(folder / f"{name}.onnx")
        values = inputs(network)
        oracle = outputs_of(on_cpu(in_float32(graph)), widened(values))
        for row in candidates(name, plan.precision, machine):
            if goal.missing(row) is not None:
                continue
            progress(CandidateStep(name, row.name, number, len(contracts)))
            opened = partial(_opened, row, model, plan, gpu, recipes, progress)
            largest = tolerance(name, plan.precision, row.tier)
            rows.append(_check_candidate(row, opened, graph, network, values, oracle, gpu, largest, recipes))
    return _worst_first(rows)


def _check_candidate(
    row: Candidate,
    opened: Open,
    graph: ModelProto,
    network: Network,
    values: Values,
    oracle: Values,
    gpu: Gpu,
    largest: float,
    recipes: Mapping[Engine, Recipe],
) -> Checked:
    wide = widened(values)
    try:
        found = compare(SegmentRunner(gpu, network, values, opened), Given("float32", wide, oracle), wide)
    except GraphError as problem:  # an engine that cannot be built: a run takes another candidate
        return Checked(row.network, row.name, math.inf, largest, problem=f"not built: {problem.message}")
    layer = ""
    if not found <= largest:
        layer = row.name
        if row.engine == Engine(row.network):  # the engine of this graph, which can have other outputs
            layer = _first_layer(graph, network, values, gpu, recipes[row.engine], largest)
    return Checked(row.network, row.name, found, largest, layer)


def _first_layer(
    graph: ModelProto, network: Network, values: Values, gpu: Gpu, recipe: Recipe, largest: float
) -> str:
    """Builds the engine with intermediate results as outputs, which may change how TensorRT fuses layers."""
    from trt_wan.engines.tensorrt import compile_onnx
    from trt_wan.runtime.segments.tensorrt import EngineSegment

    flavour, wide = recipe.engine.flavour, widened(values)
    types = {value.name: _tensor(value) for value in (*graph.graph.value_info, *graph.graph.output)}
    names = [name for name, tensor in types.items() if tensor is not None]

    def differs(some: Sequence[str]) -> bool:
        changed = marked(graph, list(some))
        outputs = tuple(tensor for name in some if (tensor := types[name]) is not None)
        plan = compile_onnx(flavour, changed.SerializeToString(), recipe.engine.target, lambda *step: None)
        trt = flavour.module
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        opened = EngineSegment(gpu.handle, trt, runtime, network.name, plan, Path("kernels are not kept"))
        runner = SegmentRunner(gpu, replace(network, outputs=outputs), values, lambda network: opened)
        made, wanted = outputs_of(runner, wide), outputs_of(on_cpu(in_float32(changed)), wide)
        return any(difference(made[name], wanted[name]) > largest for name in some)

    return first_difference(graph, names, differs)


def _opened(
    row: Candidate,
    model: ModelConfig,
    plan: Plan,
    gpu: Gpu,
    recipes: Mapping[Engine, Recipe],
    progress: Progress,
    network: Network,
) -> Segment:
    return open_segments({network.name: row}, model, plan, gpu, recipes, progress)[network.name]


def _require_small(plan: Plan) -> None:
    if plan.tokens > MOST_TOKENS:
        raise UsageError(
            f"The reference on the CPU would take minutes: {plan.tokens} tokens, at most {MOST_TOKENS}.",
            "Leave --size and --window out, or use smaller ones.",
        )


def _worst_first(rows: Sequence[Checked]) -> list[Checked]:
    return sorted(rows, key=lambda row: (bool(row.problem), -row.error / row.tolerance))


def _tensor(value: onnx.ValueInfoProto) -> Tensor | None:
    """A tensor that an engine can have as an output; None for FP8, integers and conditions."""
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value for dim in kind.shape.dim)
    if kind.elem_type == onnx.TensorProto.FLOAT:
        return Tensor(value.name, shape, "float32")
    return Tensor(value.name, shape, "bfloat16") if kind.elem_type == onnx.TensorProto.BFLOAT16 else None
