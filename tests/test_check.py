"""`trt-wan build --check`: graphs against torch, the bisection to the wrong node, and on a GPU the engines
against float32.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from on_gpu import require_gpu

from trt_wan.build import check as module
from trt_wan.build.bisect import first_difference
from trt_wan.build.check import Checked, check_graph, require_right
from trt_wan.build.check_engines import _types, check_engines, first_layer
from trt_wan.build.compare import difference, inputs, on_cpu, outputs_of, widened
from trt_wan.build.export import export
from trt_wan.build.float32_graph import in_float32, marked
from trt_wan.build.goals import Goal
from trt_wan.build.realistic import dequantised
from trt_wan.build.reference import ADDED_TO
from trt_wan.cli.main import cli
from trt_wan.engines.choice.candidates import SPARSE
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.gpu import HOPPER
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.engines.tensorrt import compile_onnx
from trt_wan.errors import GraphError
from trt_wan.runtime.events import silent

PLAN = Plan(64, 48, 5, "fp32")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """ffn's: the last part of a block."""
    path = tmp_path_factory.mktemp("graphs") / "ffn.onnx"
    export(networks(TINY, PLAN)["ffn"], TINY, PLAN, path)
    return onnx.load(path)


def changed(graph: onnx.ModelProto, kind: str, number: int, other: str) -> tuple[onnx.ModelProto, str]:
    """The graph with another operator in the place of the numbered one of its kind, and that node's name."""
    wrong = onnx.ModelProto()
    wrong.CopyFrom(graph)
    node = [node for node in wrong.graph.node if node.op_type == kind][number]
    node.op_type = other
    return wrong, node.name


def test_a_right_graph_is_right(graph: onnx.ModelProto) -> None:
    row = check_graph(graph, networks(TINY, PLAN)["ffn"], TINY, PLAN)
    assert row.right and row.error < 2e-6 and row.verdict == "ok", row


@pytest.mark.parametrize("number", [0, 2, -1])
def test_the_bisection_names_the_wrong_node(graph: onnx.ModelProto, number: int) -> None:
    wrong, name = changed(graph, "Add", number, "Sub")
    row = check_graph(wrong, networks(TINY, PLAN)["ffn"], TINY, PLAN)
    assert not row.right and row.layer == name and row.verdict == f"differs, first at {name}"
    with pytest.raises(GraphError, match=f"1 of 1 comparisons differ: ffn by onnxruntime at {name}"):
        require_right([row])


def test_the_bisection_asks_few_times(graph: onnx.ModelProto) -> None:
    """For every node that may be the first one; results behind it may be right again."""
    names = [name for node in graph.graph.node for name in node.output]
    for first in range(len(names)):
        asked: list[int] = []
        wrong = {names[first], *names[first + 3 :: 5]}

        def differs(some: Sequence[str], wrong: set[str] = wrong, asked: list[int] = asked) -> bool:
            asked.append(len(some))
            return bool(wrong & set(some))

        found = first_difference(graph, names, differs)
        assert (
            found == graph.graph.node[[names[first] in n.output for n in graph.graph.node].index(True)].name
        )
        assert len(asked) <= 2 + np.log2(len(names))
    assert "with intermediate results as outputs" in first_difference(graph, names, lambda some: False)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_a_graph_in_float32_computes_what_the_float32_network_does(
    graph: onnx.ModelProto, tmp_path: Path, precision: Precision
) -> None:
    """With the numbers that weights of 8 bits stand for; intermediate results keep their names."""
    plan = Plan(PLAN.width, PLAN.height, PLAN.frames, precision)
    network = networks(TINY, plan)["ffn"]
    export(network, TINY, plan, tmp_path / "ffn.onnx")
    twin = in_float32(onnx.load(tmp_path / "ffn.onnx"))
    values = inputs(network)
    made = outputs_of(on_cpu(twin), widened(values))
    feeds = {t.name: dequantised(t.name, values) for t in (*network.inputs, *network.weights)}
    needed = {t.name for t in networks(TINY, PLAN)["ffn"].inputs + networks(TINY, PLAN)["ffn"].weights}
    wanted = outputs_of(on_cpu(graph), {name: feeds[name] for name in needed})
    assert difference(made["x_out"], wanted["x_out"], values[ADDED_TO["x_out"]]) < 1e-5
    inner = next(node.output[0] for node in twin.graph.node if node.op_type in ("MatMul", "Gemm"))
    assert list(outputs_of(on_cpu(marked(twin, [inner])), widened(values))) == [inner]


def test_numbers_that_are_not_finite_are_infinitely_wrong() -> None:
    one = np.ones((2, 3), np.float32)
    assert difference(one * np.nan, one) == float("inf") and difference(one, one) == 0
    assert difference(one * 1.1, one) == pytest.approx(0.1, rel=1e-5)
    assert difference(one * 11, one * 10.9, one * 10) == pytest.approx(1 / 9, rel=1e-3)


# --- the command -------------------------------------------------------------------------------------------


CHECK = ["build", "--check", "--model", "tiny", "--size", "64x48", "--window", "13", "--json"]


def invoke(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli, arguments)
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def test_all_graphs_of_the_tiny_model_are_right(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    monkeypatch.setattr("trt_wan.build.goals.goals_here", lambda *arguments: [])
    code, envelope = invoke(*CHECK)
    assert code == 0, envelope
    rows = [Checked(**row) for row in envelope["data"]["checks"]]
    assert {row.network for row in rows} == set(networks(TINY, PLAN))
    assert all(row.right and row.error < 1e-5 for row in rows)
    assert [row.error for row in rows] == sorted((row.error for row in rows), reverse=True)


def test_a_wrong_graph_ends_the_command_with_its_layer(
    tiny_home: Path, monkeypatch: pytest.MonkeyPatch, graph: onnx.ModelProto
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    monkeypatch.setattr("trt_wan.build.goals.goals_here", lambda *arguments: [])
    wrong, right = Checked("ffn", "onnxruntime", 0.5, 1e-4, "node_add_3"), Checked("x", "y", 0.0, 1e-4)
    monkeypatch.setattr(module, "check_graphs", lambda *arguments: [wrong, right])
    result = CliRunner().invoke(cli, CHECK[:-1])
    assert result.exit_code == 1 and result.stdout == ""
    assert "differs, first at node_add_3" in result.stderr and "1 of 2 comparisons differ" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "832x480", "--window", "77"], "32760 tokens, at most 2048"),
        (["--precision", "bf16"], "runs fp32, not bf16"),
        (["--target", "sm89"], "--check compares the engines of this machine"),
        (["--dry-run"], "--check compares the engines of this machine"),
    ],
)
def test_check_refuses(monkeypatch: pytest.MonkeyPatch, options: list[str], says: str) -> None:
    monkeypatch.setattr("trt_wan.build.goals.goals_here", lambda *arguments: [])
    code, envelope = invoke("build", "--check", *options, "--json")
    assert code == 2 and says in envelope["error"]["message"], envelope


def test_a_network_that_nothing_computes_is_an_error() -> None:
    """On an H200 a row said "not built", and the command ended with 0."""
    spare = Checked("attention", "tensorrt", np.inf, 1e-2, problem="not built: 68 GB.")
    right = Checked("attention", "cudnn", 1e-3, 1e-2)
    require_right([spare, right])
    with pytest.raises(GraphError, match="Nothing here computes ffn: not built"):
        require_right(
            [spare, right, Checked("ffn", "tensorrt", np.inf, 1e-2, problem="not built: no layer.")]
        )


def test_intermediate_results_in_bfloat16_compile_as_outputs(tmp_path: Path) -> None:
    """Their type was lost, so that an engine that differs could not be bisected."""
    pytest.importorskip("tensorrt_rtx")
    plan = Plan(64, 48, 5, "bf16")
    export(networks(TINY, plan)["text_encoder_layer"], TINY, plan, tmp_path / "layer.onnx")
    layer = onnx.load(tmp_path / "layer.onnx")
    types = _types(layer)
    assert sum(tensor.dtype == "bfloat16" for tensor in types.values()) > 5
    graph = marked(layer, list(types)).SerializeToString()
    flavour = choose_flavour("tensorrt_rtx", None)
    assert compile_onnx(flavour, graph, "sm89", lambda *step: None)


# --- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_every_engine_is_checked_on_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    gpu = require_gpu()
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    plan = Plan(64, 48, 5, precision)
    rows = check_engines(TINY, Goal("current", plan, choose_flavour(None, gpu.capability), gpu), silent)
    for row in rows:
        print(f"{row.network:22} {row.computed_by:15} {row.error:.2e} of {row.tolerance:.0e}  {row.verdict}")
    # A candidate that is too wrong is what measuring leaves out; each network needs one that is not.
    turbo = precision == "fp8" and gpu.capability == HOPPER
    wanted = set(networks(TINY, plan)) - (set() if turbo else {SPARSE.network})
    assert {row.network for row in rows if row.right} == wanted


def test_the_bisection_names_a_layer_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of a wrong graph against the float32 twin of the right one."""
    gpu = require_gpu()
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    plan = Plan(64, 48, 5, "bf16")
    network = networks(TINY, plan)["ffn"]
    export(network, TINY, plan, tmp_path / "ffn.onnx")
    right = onnx.load(tmp_path / "ffn.onnx")
    wrong, name = changed(right, "Add", -2, "Sub")
    flavour = choose_flavour(None, gpu.capability)
    layer = first_layer(wrong, right, network, inputs(network), gpu, flavour, 1e-2)
    assert layer == name
