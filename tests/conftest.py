"""Graphs are exported once per test session, on first use, by the same code as `trt-wan build`."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from trt_wan.build.export import export
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.plan import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from trt_wan.runtime.model import Model

MakeModel = Callable[..., Model]


class ExportingExecutor(OnnxRuntimeExecutor):
    """Exports a graph the first time it is run: a test pays for the networks it uses and no others."""

    def __init__(self, graphs: Path, config: ModelConfig, plan: Plan) -> None:
        super().__init__(graphs)
        self.config, self.plan = config, plan

    def run(self, network: Network, tensors: Mapping[str, Array]) -> tuple[Array, ...]:
        path = self.graphs / f"{network.name}.onnx"
        if not path.exists():
            export(network, self.config, self.plan, path)
        return super().run(network, tensors)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_model(config, plan, {part: {weight name: array}}) -> Model on ONNX Runtime."""
    executors: dict[tuple[ModelConfig, Plan], ExportingExecutor] = {}

    def make(config: ModelConfig, plan: Plan, weights: Mapping[str, Mapping[str, Array]]) -> Model:
        if (config, plan) not in executors:
            executors[config, plan] = ExportingExecutor(tmp_path_factory.mktemp("graphs"), config, plan)
        return Model(config, plan, executors[config, plan], weights)

    return make
