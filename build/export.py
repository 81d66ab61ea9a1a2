"""Contracts and graphs to ONNX files without weights, shapes only, so that the 14B exports in little memory.

torch runs under fake tensors: nothing is computed and nothing is allocated. Every exported graph is compared
with its contract (names, shapes, types) and passes the ONNX checker before it counts.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import checker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from trt_wan.build.models import GRAPHS
from trt_wan.build.models.ops import OPSET
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.files import named

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int64": torch.int64,
}
_ONNX_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "int8": onnx.TensorProto.INT8,
    "int64": onnx.TensorProto.INT64,
}

# The arguments of torch's private export that we pass.
PASSED = {"registry", "input_names", "output_names", "opset_version", "optimize", "verbose"}

# A network's graph: its inputs in the contract's order, its weights by name.
GraphFunction = Callable[[Sequence[torch.Tensor], dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]


class _Graph(torch.nn.Module):
    """A graph function as a module whose positional arguments are the contract's inputs, then its weights."""

    def __init__(self, network: Network, function: GraphFunction) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(self.network.inputs)
        names = (weight.name for weight in self.network.weights)
        return self.function(tensors[:count], dict(zip(names, tensors[count:], strict=True)))


def export(network: Network, model: ModelConfig, plan: Plan, path: Path) -> None:
    """Writes the ONNX graph of `network` to `path`."""
    export_function(network, graph_function(network, model, plan), path)


def export_function(network: Network, function: GraphFunction, path: Path) -> None:
    """Writes the ONNX graph of `network`, which `function` computes, to `path`."""
    proto = _exported(network, function, FakeTensorMode()).model_proto
    _assert_kept(proto, network)
    _forget_origin(proto)
    checker.check_model(proto, full_check=True)
    with named(path):
        path.write_bytes(proto.SerializeToString())


def exported_program(network: Network, model: ModelConfig, plan: Plan) -> ExportedProgram:
    """The program behind the graph of `network`: its nodes have the names of the graph's tensors."""
    program: ExportedProgram = _exported(
        network, graph_function(network, model, plan), nullcontext()
    ).exported_program
    return program


def graph_function(network: Network, model: ModelConfig, plan: Plan) -> GraphFunction:
    def graph(inputs: Sequence[torch.Tensor], weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return GRAPHS[network.name](*inputs, w=weights, model=model, plan=plan)

    return graph


def _exported(network: Network, function: GraphFunction, mode: AbstractContextManager[Any]) -> Any:
    """torch's ONNXProgram. `mode` decides whether its tensors have memory."""
    tensors = network.inputs + network.weights
    with mode, torch.no_grad():
        args = tuple(torch.empty(t.shape, dtype=_DTYPES[t.dtype]) for t in tensors)
        program = torch.export.export(_Graph(network, function), args)
    # The exporter reports that torchvision is missing, which no graph needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = _export_call()(
            program,
            (),
            input_names=[t.name for t in tensors],
            output_names=[t.name for t in network.outputs],
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    assert exported is not None
    return exported


@cache
def _export_call() -> Callable[..., Any]:
    """torch.onnx.export, with one table of torch's operators for all graphs.

    torch.onnx.export parses the sources of 500 operators for every graph, which takes a second, and has no
    argument for a table that exists. The function behind it has one, which is private: a torch whose function
    differs gets torch.onnx.export. The graphs are the same, byte for byte.
    """
    try:
        from torch.onnx._internal.exporter._core import export as behind
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        if not PASSED <= signature(behind).parameters.keys():
            return torch.onnx.export
        return partial(behind, registry=ONNXRegistry.from_torchlib(opset_version=OPSET))
    except (ImportError, AttributeError, TypeError, ValueError):
        return torch.onnx.export


def _forget_origin(proto: onnx.ModelProto) -> None:
    """Removes the lines of Python that each node comes from. An engine's key has the hash of its graph, and a
    graph that is exported again, in another folder or by a later release, is the same.
    """
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]


def _assert_kept(proto: onnx.ModelProto, network: Network) -> None:
    """The exporter may drop unused inputs or rename; the runtime binds by name, so nothing may differ."""

    def described(values: list[onnx.ValueInfoProto]) -> list[tuple[str, tuple[int, ...], int]]:
        return [
            (v.name, tuple(d.dim_value for d in v.type.tensor_type.shape.dim), v.type.tensor_type.elem_type)
            for v in values
        ]

    def wanted(tensors: tuple[Tensor, ...]) -> list[tuple[str, tuple[int, ...], int]]:
        return [(t.name, t.shape, _ONNX_TYPES[t.dtype]) for t in tensors]

    got, want = described(list(proto.graph.input)), wanted(network.inputs + network.weights)
    assert got == want, f"{network.name}: inputs differ from the contract:\n{got}\n{want}"
    got, want = described(list(proto.graph.output)), wanted(network.outputs)
    assert got == want, f"{network.name}: outputs differ from the contract:\n{got}\n{want}"
