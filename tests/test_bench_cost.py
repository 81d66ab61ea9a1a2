"""The cost table against the graphs it speaks of and against a job that counts its calls."""

import dataclasses
from pathlib import Path

import onnx
import pytest
from tiny_job import PLAN

from trt_wan.benchmarks.work.cost import Unit, Work, calls, seconds_at_best, works
from trt_wan.benchmarks.work.graph_flops import counted_flops
from trt_wan.build.export import export
from trt_wan.engines.config import ANIMATE_14B, TINY, ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import require_graphs


def same_as_graph(name: str, model: ModelConfig, plan: Plan, path: Path) -> None:
    work = works(model, plan)[name]
    assert (work.linear + work.attention, work.convolution) == counted_flops(onnx.load(path)), name


@pytest.mark.parametrize("name", sorted(networks(TINY, PLAN)))
def test_flops_are_those_of_the_graph(name: str, tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    same_as_graph(name, TINY, PLAN, require_graphs(TINY, PLAN) / f"{name}.onnx")


def test_flops_are_those_of_the_full_size_graph(tmp_path: Path) -> None:
    plan = Plan(precision="bf16")
    for name in ("attn_out", "cross_attention", "ffn"):
        path = tmp_path / f"{name}.onnx"
        export(networks(ANIMATE_14B, plan)[name], ANIMATE_14B, plan, path)
        same_as_graph(name, ANIMATE_14B, plan, path)


@pytest.mark.long
def test_flops_of_longer_vae_chunks(tmp_path: Path) -> None:
    path, plan = tmp_path / "encode.onnx", Plan(64, 48, 13, vae_chunk=3)
    export(networks(TINY, plan)["vae_encode_next"], TINY, plan, path)
    same_as_graph("vae_encode_next", TINY, plan, path)


def test_a_step_of_the_14b() -> None:
    """The figures of perf_peers.md, section 5, case A: 0.81 PFLOP of linears, 0.88 of self-attention."""
    plan = Plan(832, 480, 77, "fp8")
    table, counts = works(ANIMATE_14B, plan), calls(ANIMATE_14B, plan, steps=20)
    linear = sum(work.linear * counts[name].step for name, work in table.items())
    assert linear == pytest.approx(810.8e12, rel=2e-3)
    assert table["attention"].flops * counts["attention"].step == pytest.approx(879.2e12, rel=1e-3)
    assert (
        sum(w.bytes * counts[n].step for n, w in table.items() if n == "attention")
        == 40 * 4 * 32760 * 5120 * 2
    )
    assert table["attn_in"].fp8 and not table["fuser"].fp8


def test_bytes_are_those_of_the_contract_in_its_types() -> None:
    exact, quantised = (works(TINY, Plan(64, 48, 13, p))["attn_in"] for p in ("fp32", "fp8"))
    d, tokens = 256, 5 * 3 * 4
    tables = 4 * (2 * tokens * 64 + 6 * d)  # RoPE of head_dim/2, modulation of the step
    small = 4 * (6 * d + 3 * d + 2 * d)  # modulation, biases, norms
    assert exact.bytes == 4 * tokens * d + tables + small + 4 * 3 * d * d + 4 * 3 * tokens * d
    assert quantised.bytes == 4 * tokens * d + tables + small + 3 * d * d + 4 * 3 * d + 2 * 3 * tokens * d


def test_the_bound_is_the_longer_of_computing_and_moving() -> None:
    rates: dict[Unit, float] = {"linear": 10.0, "linear fp8": 20.0, "attention": 5.0, "convolution": 1.0}
    work = Work(linear=100, attention=50, convolution=3, bytes=200)
    assert seconds_at_best(work, rates, 1e9) == pytest.approx(10 + 10 + 3)
    assert seconds_at_best(work, rates, 2) == pytest.approx(100)
    assert seconds_at_best(dataclasses.replace(work, fp8=True), rates, 1e9) == pytest.approx(5 + 10 + 3)
