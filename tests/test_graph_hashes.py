"""A graph that changes needs a new GRAPHS_VERSION, or users go on with the graphs they exported before."""

import json
from dataclasses import replace
from pathlib import Path

import graph_hashes
import onnx
import pytest
from tiny_job import PLAN

from trt_wan.engines.config import TINY
from trt_wan.engines.store.graphs import require_graphs

HINT = "raise GRAPHS_VERSION in its contracts, then run: python tests/graph_hashes.py"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind == "wan" else pytest.mark.long)  # these change rarely
        for kind in graph_hashes.HASHES
    ],
)
def test_graphs_are_those_of_their_version(
    kind: str, tmp_path: Path, tiny_home: Path, tiny_fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = {}
    for precision, home in (("fp32", tiny_home), ("fp8", tiny_fp8)):
        monkeypatch.setenv("TRT_WAN_HOME", str(home))
        ready[precision] = require_graphs(TINY, replace(PLAN, precision=precision))
    pinned = json.loads(graph_hashes.PINNED.read_text())[kind]
    made = dict(graph_hashes.HASHES[kind](tmp_path, ready))
    changed = {name for name in made | pinned["graphs"] if made.get(name) != pinned["graphs"].get(name)}
    assert not changed or graph_hashes.VERSIONS[kind] != pinned["version"], f"{sorted(changed)}: {HINT}"
    assert not changed and graph_hashes.VERSIONS[kind] == pinned["version"], HINT.partition("then ")[2]


def test_the_hash_covers_the_computation_and_no_names(tmp_path: Path) -> None:
    def saved(op: str, middle: str, doc: str, axis: int = 0) -> str:
        nodes = [
            onnx.helper.make_node(op, ["x"], [middle], name=f"node of {doc}", doc_string=doc),
            onnx.helper.make_node("Concat", [middle, "c"], ["y"], axis=axis),
        ]
        x, y = (onnx.helper.make_tensor_value_info(name, 1, (2, 2)) for name in "xy")
        c = onnx.helper.make_tensor("c", 1, (2, 2), [1, 2, 3, 4])
        graph = onnx.helper.make_graph(nodes, doc, [x], [y], [c], doc_string=doc)
        onnx.save(onnx.helper.make_model(graph, producer_name=doc), tmp_path / "net.onnx")
        return graph_hashes.graph_hash(tmp_path / "net.onnx")

    plain = saved("Neg", "middle", "torch 2.12")
    assert plain == saved("Neg", "other", "torch 2.13")
    assert len({plain, saved("Abs", "middle", "torch 2.12"), saved("Neg", "middle", "torch 2.12", 1)}) == 3
