"""TensorRT-RTX takes SAM2's fp16 graphs, on a machine without a GPU, for both kinds of GPU that people have,
and ONNX Runtime computes nearly what float32 does. What the engines compute takes a GPU to tell.

Here a small model at 256x256; base_plus and large at 1024 take seconds each and were compiled once.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from plan_text import fused_attentions

from trt_wan.build.sam2 import GRAPHS, build_sam2_graphs
from trt_wan.cli.main import cli
from trt_wan.engines.contract import Network
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.gpu import Target
from trt_wan.engines.sam2.config import SAM2_MODELS, Sam2Plan
from trt_wan.engines.sam2.contracts import networks
from trt_wan.engines.sam2.recipes import graph_set
from trt_wan.engines.tensorrt import compile_onnx
from trt_wan.errors import GraphError
from trt_wan.preprocess.sam2.model import GPU_PLAN, Sam2Model
from trt_wan.preprocess.sam2.position_tables import tables
from trt_wan.preprocess.sam2.tracker import MASKED
from trt_wan.preprocess.sam2.weights import random_sam2_weights, weights_of

pytest.importorskip("tensorrt_rtx")

Values = NDArray[np.float32]

# One block per stage, one of them global, one layer of memory attention: every kind of layer once.
MODEL = replace(
    SAM2_MODELS["sam2.1_tiny"], image_size=256, blocks=(1, 1, 2, 1), global_blocks=(3,), memory_layers=1
)
PLAN = Sam2Plan("fp16", batch=2, memories=(7,))
HALF = ("half", "half", "half")
FUSED = {"encoder": 5, "track_query": 1}  # the decoder is float32, and a kernel attends to memories


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(home))
        with pytest.raises(GraphError, match="not built") as caught:
            graph_set(MODEL, PLAN).require()
        assert caught.value.hint == "Run:\ntrt-wan build --sam2 sam2.1_tiny"
        made: list[str] = []
        folder = build_sam2_graphs(MODEL, PLAN, lambda name, seconds: made.append(name))
        assert sorted(made) == sorted(networks(MODEL, PLAN)) and graph_set(MODEL, PLAN).require() == folder
        build_sam2_graphs(MODEL, PLAN, lambda name, seconds: pytest.fail("made twice"))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm89", "sm120"])
@pytest.mark.parametrize("name", networks(MODEL, PLAN))
def test_every_graph_compiles_and_heavy_attention_is_fused(graphs: Path, name: str, target: Target) -> None:
    graph = (graphs / f"{name}.onnx").read_bytes()
    assert len(graph) < 3e6, "a graph holds weights or tables"
    flavour = choose_flavour("tensorrt_rtx", None)
    plan = compile_onnx(flavour, graph, target, lambda phase, step, steps: None)
    assert fused_attentions(plan) == [HALF] * FUSED.get(name, 0)


@pytest.mark.long
def test_fp16_is_near_float32(graphs: Path) -> None:
    """The fp16 graphs in ONNX Runtime against the same functions run by torch in float32."""
    weights = weights_of(MODEL, random_sam2_weights(MODEL, 1))
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, 256, 256), np.float32)
    features = by_torch("encoder", {"pixels": pixels}, weights)
    for got, want in zip(
        by_onnxruntime(graphs, "encoder", {"pixels": pixels}, weights), features, strict=True
    ):
        assert relative(got, want) < 3e-3

    names = ("feat", "high1", "high0")
    inputs = {name: feature[0] for name, feature in zip(names, features, strict=True)} | tables(MODEL)
    inputs |= {
        "memory_time": 0.3 * rng.standard_normal((7, 64)),
        "memory_bias": np.where(np.arange(7) < 4, 0, MASKED),
        "pointers": rng.standard_normal((16, 256)),
        "pointer_bias": np.where(np.arange(16) < 6, 0, MASKED),
        "pointer_time": np.arange(16) / 15,
        "seen": np.array([4 * MODEL.tokens, 6 * 4]),
    }
    inputs |= {f"memory_{i}": rng.standard_normal((256, 64)).astype(ml_dtypes.bfloat16) for i in range(7)}
    whole = by_torch("track_7", inputs, weights)
    for how, limit in ((by_torch, 1e-5), (partial(by_onnxruntime, graphs), 1e-3)):
        model = Sam2Model(MODEL, PLAN, InParts(how, weights), weights)
        got = [np.asarray(output) for output in model.track(7, inputs)]
        errors = [relative(g, w) for g, w in zip(got, whole, strict=False)]
        print(how, errors)
        assert all(error < limit for error in errors[:3])
        assert len(errors) == 3 or errors[3] < 5e-3  # rounded to bf16


@dataclass
class InParts:
    """An executor: graphs by `how`, attention to memories in float32."""

    how: Callable[..., list[Values]]
    weights: Mapping[str, Values]

    def run(self, network: Network, n: int, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        if not network.name.startswith("track_attention"):
            return tuple(self.how(network.name, inputs, self.weights, n))
        memories, pointers = inputs["seen"]
        last = 7 * MODEL.tokens + pointers
        q, k, v = (np.asarray(inputs[name], np.float32) for name in ("q", "keys", "values"))
        k, v = (np.concatenate((t[:memories], t[7 * MODEL.tokens : last])) for t in (k, v))
        logits = q @ k.T
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return (shares / shares.sum(1, keepdims=True) @ v,)


@pytest.mark.long
def test_trt_wan_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for both executors and engines, once; listed with the command that builds them again."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    monkeypatch.setitem(SAM2_MODELS, "sam2.1_tiny", MODEL)
    command = ("build", "--sam2", "tiny", "--target", "sm89")

    dry = data_of(*command, "--dry-run")
    assert len(dry["missing_graphs"]) == 12 and {row["state"] for row in dry["engines"]} == {"would be built"}
    built = data_of(*command)
    names = list(networks(MODEL, GPU_PLAN))
    assert built["graphs"] == 12 and [row["name"] for row in built["engines"]] == names
    assert {row["state"] for row in built["engines"]} == {"built"}
    graph_set(MODEL, Sam2Plan()).require()
    again = data_of(*command)
    assert again["graphs"] == 0 and {row["state"] for row in again["engines"]} == {"there"}
    rows = data_of("list")["engines"]
    assert {row["network"] for row in rows} == set(names)
    described = {(row["kind"], row["about"], row["precision"]) for row in rows}
    assert described == {("sam2", "sam2.1_tiny, 256x256", "fp16")}
    rebuild = ["build", "--sam2", "sam2.1_tiny", "--target", "sm89", "--flavour", "tensorrt_rtx"]
    assert all(row["rebuild"] == rebuild for row in rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("nobody",), "no file and no SAM2 model"),
        (("base_plus", "--precision", "bf16"), "SAM2's engines are fp16"),
    ],
)
def test_what_trt_wan_build_cannot_do(options: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(cli, ("build", "--sam2", *options))
    assert result.exit_code == 2 and says in result.output


def data_of(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, (*arguments, "--json"))
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1])["data"])


def relative(got: Values, want: Values) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def by_torch(name: str, inputs: Mapping[str, Any], weights: Mapping[str, Values], n: int = 0) -> list[Values]:
    """In float32, whatever the contract says."""
    network = (networks(MODEL, replace(PLAN, precision="fp32")) | networks(MODEL, PLAN))[name]
    given = [torch.from_numpy(np.asarray(inputs[t.name], np.float32)) for t in network.inputs]
    w = {t.name: torch.from_numpy(weights[network.weight_key(t.name, n)]) for t in network.weights}
    with torch.no_grad():
        outputs = GRAPHS[name.removesuffix("_7")](*given, w=w, config=MODEL)
    return [output.numpy() for output in outputs]


def by_onnxruntime(
    graphs: Path, name: str, inputs: Mapping[str, Any], weights: Mapping[str, Values], n: int = 0
) -> list[Values]:
    """Without outputs in bf16, which numpy cannot take."""
    network = networks(MODEL, PLAN)[name]
    session = onnxruntime.InferenceSession(graphs / f"{name}.onnx", providers=["CPUExecutionProvider"])
    feeds = {}
    for t in network.inputs + network.weights:
        given = inputs[t.name] if t in network.inputs else weights[network.weight_key(t.name, n)]
        value = np.ascontiguousarray(given, np.dtype(t.dtype))
        make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        if t.dtype == "bfloat16":
            feeds[t.name] = make(value.view(np.uint16), onnx.TensorProto.BFLOAT16)
        else:
            feeds[t.name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
    wanted = [t.name for t in network.outputs if t.dtype != "bfloat16"]
    return [output.numpy() for output in session.run_with_ort_values(wanted, feeds)]
