"""Every graph of the 14B exports at real sizes, checked by ONNX, with no weights and little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from trt_wan.engines.config import ANIMATE_14B
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan

MEMORY_LIMIT_GB = 4


@pytest.mark.parametrize("size", ["832x480", "1280x720"])
def test_14b_exports_without_weights(tmp_path: Path, size: str) -> None:
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
