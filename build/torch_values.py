"""Runs a graph's function in torch on the CPU: its outputs, or every result by its name in the graph."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import InputKind

from trt_wan.build.export import exported_program, graph_function
from trt_wan.build.realistic import Host
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.shape import Plan

Values = Mapping[str, Host]


def torch_outputs(network: Network, model: ModelConfig, plan: Plan, values: Values) -> dict[str, Host]:
    """The outputs by name, from all inputs and weights."""
    tensors = _tensors(network, values)
    inputs = tensors[: len(network.inputs)]
    weights = dict(zip((t.name for t in network.weights), tensors[len(inputs) :], strict=True))
    with torch.no_grad():
        outputs = graph_function(network, model, plan)(inputs, weights)
    return {t.name: made.numpy() for t, made in zip(network.outputs, outputs, strict=True)}


def torch_values(network: Network, model: ModelConfig, plan: Plan, values: Values) -> dict[str, Host]:
    """Every float32 result. The outputs have their contract's names, the others those of torch's exporter."""
    program = exported_program(network, model, plan)
    recorder = _Recorder(program.graph_module)
    feed = iter(_tensors(network, values))
    placeholders = [
        next(feed) if spec.kind == InputKind.USER_INPUT else _constant(program, spec.target)
        for spec in program.graph_signature.input_specs
    ]
    with torch.no_grad():
        outputs = recorder.run(*placeholders)
    found = recorder.found | {t.name: out for t, out in zip(network.outputs, outputs, strict=True)}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def _tensors(network: Network, values: Values) -> list[torch.Tensor]:
    every = network.inputs + network.weights
    return [torch.from_numpy(np.ascontiguousarray(values[tensor.name])) for tensor in every]


def _constant(program: Any, target: str) -> torch.Tensor:
    held: torch.Tensor = (
        program.constants[target] if target in program.constants else program.state_dict[target]
    )
    return held


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, torch.Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "placeholder" and isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.found[n.name] = result
        return result
