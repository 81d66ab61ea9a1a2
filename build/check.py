"""`trt-wan build --check`: engines and kernels against ONNX Runtime, or without a GPU graphs against torch.

Both sides take the same seeded inputs through polygraphy's Comparator. On a GPU the reference is ONNX Runtime
on the CPU, which runs the engine's own graph with all numbers in float32 (float32_graph.py): FP8 weights
count as the numbers that they stand for. Without a GPU ONNX Runtime runs the exported float32 graph, and
torch is the reference. A failure is traced to the first layer that differs (bisect.py). This module has the
graphs, check_engines.py the engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import ModelProto

from trt_wan.build.bisect import first_difference
from trt_wan.build.compare import Given, compare, differs_among, inputs, on_cpu, outputs_of
from trt_wan.build.compile import export_graphs
from trt_wan.build.float32_graph import marked
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import graph_set
from trt_wan.errors import GraphError, UsageError
from trt_wan.runtime.events import CandidateStep, Progress

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
    """Raises GraphError if a comparison failed, with the layer, or if nothing can compute a network."""
    computed = {row.network for row in checked if not row.problem}
    for row in checked:
        if row.network not in computed:
            raise GraphError(
                f"Nothing here computes {row.network}: {row.problem}", "Report it, with the table."
            )
    wrong = [row for row in checked if not row.right and not row.problem]
    if wrong:
        names = [f"{row.network} by {row.computed_by} at {row.layer}" for row in wrong]
        raise GraphError(
            f"{len(wrong)} of {len(checked)} comparisons differ: {'; '.join(names[:5])}.",
            "Build the engines again; if they differ still, please report it with the table.",
        )


def check_graphs(model: ModelConfig, plan: Plan, progress: Progress) -> list[Checked]:
    """The graphs on ONNX Runtime against their functions in torch, the worst first. Raises UsageError."""
    if plan.precision != "fp32":
        raise UsageError(
            f"ONNX Runtime on the CPU runs fp32, not {plan.precision}.", "Leave --precision out."
        )
    require_small(plan)
    export_graphs(model, plan, progress)
    folder = graph_set(model, plan).require()
    contracts = networks(model, plan)
    rows = []
    for number, (name, network) in enumerate(contracts.items(), 1):
        progress(CandidateStep(name, "onnxruntime", number, len(contracts)))
        rows.append(check_graph(onnx.load(folder / f"{name}.onnx"), network, model, plan))
    return worst_first(rows)


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
            return differs_among(made, computed, values, CPU_TOLERANCE)

        layer = first_difference(graph, computed, differs)
    return Checked(network.name, "onnxruntime", found, CPU_TOLERANCE, layer)


def require_small(plan: Plan) -> None:
    if plan.tokens > MOST_TOKENS:
        raise UsageError(
            f"The reference on the CPU would take minutes: {plan.tokens} tokens, at most {MOST_TOKENS}.",
            "Leave --size and --window out, or use smaller ones.",
        )


def worst_first(rows: Sequence[Checked]) -> list[Checked]:
    return sorted(rows, key=lambda row: (bool(row.problem), -row.error / row.tolerance))
