"""Every graph of the 14B exports at real sizes, checked by ONNX, with no weights and little memory."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from tiny_job import PLAN
from torch.onnx._internal.exporter._registration import ONNXRegistry

import trt_wan.build.export
from trt_wan.build.export import _export_call, export
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan

MEMORY_LIMIT_GB = 4
FP8 = replace(PLAN, precision="fp8")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """torch's function for the export is looked for again, in the test and after it."""
    _export_call.cache_clear()
    yield monkeypatch
    _export_call.cache_clear()


def exported(path: Path, name: str = "attn_in", plan: Plan = FP8) -> bytes:
    export(networks(TINY, plan)[name], TINY, plan, path)
    return path.read_bytes()


def test_one_table_of_operators_serves_all_graphs(tmp_path: Path, anew: pytest.MonkeyPatch) -> None:
    made, make = [], ONNXRegistry.from_torchlib
    anew.setattr(ONNXRegistry, "from_torchlib", lambda **options: made.append(options) or make(**options))
    first = exported(tmp_path / "graph.onnx")
    exported(tmp_path / "graph.onnx", "text_embed")
    assert len(made) == 1
    assert exported(tmp_path / "graph.onnx") == first, "the table is as it was"


@pytest.mark.parametrize("torch_lacks", ["the module", pytest.param("the argument", marks=pytest.mark.long)])
def test_a_torch_without_its_private_function_exports_the_same_bytes(
    tmp_path: Path, anew: pytest.MonkeyPatch, torch_lacks: str
) -> None:
    wanted = exported(tmp_path / "graph.onnx")
    _export_call.cache_clear()
    if torch_lacks == "the module":
        anew.setitem(sys.modules, "torch.onnx._internal.exporter._registration", None)
    else:
        anew.setattr(trt_wan.build.export, "PASSED", {"an argument of a later release"})
    assert _export_call() is torch.onnx.export
    assert exported(tmp_path / "graph.onnx") == wanted


def test_a_graph_does_not_depend_on_the_place_of_our_source(tmp_path: Path) -> None:
    """torch notes the line of Python of each node in the graph; an engine's key has the graph's hash."""
    graph = exported(tmp_path / "graph.onnx")
    assert b".py" not in graph and b"Graph/" not in graph


@pytest.mark.long
def test_14b_exports_without_weights(tmp_path: Path) -> None:
    size = "832x480"
    command = [sys.executable, "-m", "trt_wan", "build", "--model", "14b", "--size", size, "--json"]
    run = subprocess.run(
        command, env=os.environ | {"TRT_WAN_HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    data = json.loads(run.stdout.splitlines()[-1])["data"]
    width, height = map(int, size.split("x"))
    contracts = networks(ANIMATE_14B, Plan(width, height, 77))
    print(f"{size}: {data['graphs']} graphs in {data['seconds']} s, {data['peak_memory_gb']} GB at most")
    assert data["graphs"] == len(contracts)
    assert data["peak_memory_gb"] < MEMORY_LIMIT_GB

    # The contract's tensors are the graph's inputs, and what is stored in it is small: no weight among it.
    # The largest constants are the blur kernels of the motion encoder, 0.25 MB.
    for name, network in contracts.items():
        path = Path(data["result"]) / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(str(path)).graph
        wanted = [tensor.name for tensor in network.inputs + network.weights]
        assert [value.name for value in graph.input] == wanted
        stored = sum(len(tensor.raw_data) for tensor in graph.initializer)
        assert path.stat().st_size < 1e6 and stored < 5e5, f"{name}: {stored} bytes of constants"
