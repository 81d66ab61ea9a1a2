"""Graphs are exported once per test session, by the same code as `trt-wan build`: one by one on first use
(`make_model`), or all of a tiny job's by the command itself (`tiny_home`).
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tiny_job import BUILD, as_argv

from trt_wan.build.export import export
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Part
from trt_wan.engines.plan import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from trt_wan.runtime.model import Model

MakeModel = Callable[..., Model]
Weights = Mapping[Part, Mapping[str, Array]]


class ExportingExecutor(OnnxRuntimeExecutor):
    """Exports a graph the first time it is run: a test pays for the networks it uses and no others."""

    def __init__(self, graphs: Path, weights: Weights, config: ModelConfig, plan: Plan) -> None:
        super().__init__(graphs, weights)
        self.config, self.plan = config, plan

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        path = self.graphs / f"{network.name}.onnx"
        if not path.exists():
            export(network, self.config, self.plan, path)
        return super().run(network, n, inputs)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_model(config, plan, {part: {weight name: array}}) -> Model on ONNX Runtime."""
    graphs: dict[tuple[ModelConfig, Plan], Path] = {}

    def make(config: ModelConfig, plan: Plan, weights: Weights) -> Model:
        if (config, plan) not in graphs:
            graphs[config, plan] = tmp_path_factory.mktemp("graphs")
        return Model(config, plan, ExportingExecutor(graphs[config, plan], weights, config, plan), weights)

    return make


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TRT_WAN_HOME with the graphs of tiny_job.PLAN, made by the command that `trt-wan run` asks for."""
    home = tmp_path_factory.mktemp("tiny-home")
    built = subprocess.run(
        as_argv(BUILD), env=os.environ | {"TRT_WAN_HOME": str(home)}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return home


@pytest.fixture
def nvrtc() -> None:
    """Skips where our kernels cannot be compiled."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # a missing library raises what the loader likes
        pytest.skip(f"NVRTC is not here: {error}")
