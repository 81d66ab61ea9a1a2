"""Every graph becomes an engine, with FP8 GEMMs where they should be and without weights, on a machine
without a GPU. Whether an engine computes the right thing takes a GPU to tell.

Two processes fill one store at the same time, one with fp8 engines for two kinds of GPU and one with fp32
engines for one. Of the first, the engines that fp32 has too are missing for sm89, and the others are those of
`tiny_engines`. bf16 differs from fp8 in three networks, which are compiled here.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import pytest
from conftest import Engines
from plan_text import fused_attentions, gemms, kernels
from tiny_job import PLAN

from trt_wan.build.compile import compile_engines
from trt_wan.build.export import export
from trt_wan.engines.choice.candidates import has_engine
from trt_wan.engines.choice.recipes import engine_names, recipes
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.gpu import Target
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.engines.store import engines as engine_store
from trt_wan.engines.store.engine_id import Recipe
from trt_wan.engines.store.entries import entries
from trt_wan.engines.tensorrt import compile_onnx
from trt_wan.errors import UsageError
from trt_wan.runtime.events import EngineReady, EngineStep, Event

pytest.importorskip("tensorrt_rtx")

PLANS: dict[Precision, Plan] = {p: replace(PLAN, precision=p) for p in ("fp32", "bf16", "fp8")}
TARGETS: tuple[Target, ...] = ("sm89", "sm120")
STORED: dict[Precision, tuple[Target, ...]] = {"fp32": ("sm89",), "fp8": TARGETS}
# The networks that are float32 at every precision.
SAME = {
    name
    for name, network in networks(TINY, PLANS["fp8"]).items()
    if network == networks(TINY, PLANS["fp32"])[name]
}
FP8 = ("fp8_e4m3", "fp8_e4m3")
BF16 = ("bf16", "bf16")
FP8_GEMMS = {"attn_in": 3, "attn_out": 2, "ffn": 3, "context_kv": 4}
MEMORY_LIMIT_GB = 8

COMPILE = """
import json, sys
from trt_wan.build.compile import compile_engines
from trt_wan.engines.config import TINY
from trt_wan.engines.shape import Plan
from trt_wan.engines.flavour import choose_flavour

plan = Plan(64, 48, 13, sys.argv[1])
for target in sys.argv[2:]:
    report = compile_engines(TINY, plan, target, choose_flavour("tensorrt_rtx", None), lambda event: None)
    built = [row.name for row in report.engines if row.state == "built"]
    print(json.dumps({"built": built, "torch": "torch" in sys.modules}))
"""

# The heaviest parts of the 14B, from nothing: exported, compiled, measured.
SUBSET = """
import resource, sys
from pathlib import Path
from typing import cast
from trt_wan.build.export import export
from trt_wan.engines.config import ANIMATE_14B as model
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.tensorrt import compile_attention, compile_onnx

folder, plan, flavour = Path(sys.argv[1]), Plan(832, 480, 77, "fp8"), choose_flavour("tensorrt_rtx", None)
silent = lambda phase, step, steps: None
for name in sys.argv[2:]:
    export(networks(model, plan)[name], model, plan, folder / f"{name}.onnx")
    graph = (folder / f"{name}.onnx").read_bytes()
    (folder / f"{name}.plan").write_bytes(compile_onnx(flavour, graph, "sm89", silent))
c = model.transformer
fp8 = compile_attention(flavour, c.heads, plan.tokens, c.head_dim, True, "sm89", silent)
(folder / "attention_fp8.plan").write_bytes(fp8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def start(home: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE, *arguments],
        env=os.environ | {"TRT_WAN_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path, tiny_engines: Engines) -> Path:
    """A TRT_WAN_HOME with the engines of STORED."""
    home = tmp_path_factory.mktemp("filled") / "home"
    shutil.copytree(tiny_engines.home, home)
    shutil.copytree(tiny_home, home, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(home))
        for name, recipe in recipes_for("fp8", "sm89").items():
            if name in SAME:
                (home / "engines" / f"{recipe.engine.key}.plan").unlink()
    for process in [start(home, precision, *targets) for precision, targets in STORED.items()]:
        _, err = process.communicate()
        assert process.returncode == 0, err
    return home


@pytest.fixture
def home(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(filled))
    return filled


def recipes_for(precision: Precision, target: Target) -> dict[str, Recipe]:
    made = recipes(TINY, PLANS[precision], target, choose_flavour("tensorrt_rtx", None))
    return {name: made[name] for name in engine_names(TINY, PLANS[precision])}


def stored(precision: Precision, target: Target) -> dict[str, bytes]:
    return {name: engine_store.open_checked(r.engine) for name, r in recipes_for(precision, target).items()}


@cache
def bf16_plans(folder: Path, target: Target) -> Mapping[str, bytes]:
    """Of the networks that fp8 computes otherwise."""
    plan, plans = PLANS["bf16"], {}
    for name, network in networks(TINY, plan).items():
        if network != networks(TINY, PLANS["fp8"])[name]:
            graph = folder / f"{name}-bf16.onnx"
            if not graph.exists():
                export(network, TINY, plan, graph)
            flavour = choose_flavour("tensorrt_rtx", None)
            plans[name] = compile_onnx(flavour, graph.read_bytes(), target, lambda *progress: None)
    return plans


@pytest.mark.parametrize("target", TARGETS)
def test_every_graph_compiles(home: Path, target: Target) -> None:
    for precision in (precision for precision, targets in STORED.items() if target in targets):
        plans = stored(precision, target)
        assert list(plans) == list(engine_names(TINY, PLANS[precision]))
        assert set(networks(TINY, PLANS[precision])) - {"sparse_attention"} <= set(plans)
        assert all(plans.values())
    assert set(bf16_plans(home, target)) == set(FP8_GEMMS)


@pytest.mark.parametrize("target", TARGETS)
def test_every_fp8_linear_is_an_fp8_gemm(home: Path, target: Target) -> None:
    """TensorRT makes an FP8 layer that it cannot run into a bf16 one, without a word (trt_facts.md 2.2)."""
    plans = stored("fp8", target)
    found = {name: [gemm[:2] for gemm in gemms(plan)] for name, plan in plans.items()}
    assert {name: kinds for name, kinds in found.items() if FP8 in kinds} == {
        name: [FP8] * count for name, count in FP8_GEMMS.items()
    }
    for name, plan in bf16_plans(home, target).items():
        assert [gemm[:2] for gemm in gemms(plan)] == [BF16] * FP8_GEMMS[name], name


@pytest.mark.parametrize(
    "name", ["ffn", *(pytest.param(n, marks=pytest.mark.long) for n in FP8_GEMMS if n != "ffn")]
)
def test_int8_compiles_for_gpus_without_fp8(tmp_path: Path, name: str) -> None:
    """Products in bf16, of the weights and of the tokens' rotation. TensorRT makes one of several."""
    plan = replace(PLAN, precision="int8")
    export(networks(TINY, plan)[name], TINY, plan, tmp_path / "graph")
    rotations = {"attn_in": 1, "attn_out": 2, "ffn": 3, "context_kv": 2}
    for target in ("sm80", "sm86"):
        graph, flavour = (tmp_path / "graph").read_bytes(), choose_flavour("tensorrt_rtx", None)
        made = compile_onnx(flavour, graph, cast(Target, target), lambda *progress: None)
        assert {gemm[:2] for gemm in gemms(made)} == {BF16}
        names = [kernel.name for kernel in kernels(made) if kernel.kind == "fully_connected"]
        assert len("+".join(names).split("+")) == FP8_GEMMS[name] + rotations[name], target


@pytest.mark.parametrize("target", TARGETS)
def test_attention_is_one_kernel(home: Path, target: Target) -> None:
    plans = stored("fp8", target)
    assert fused_attentions(plans["attention"]) == [("bf16",) * 3]
    assert fused_attentions(plans["attention_fp8"]) == [("fp8_e4m3",) * 3]
    assert fused_attentions(plans["cross_attention"]) == [("bf16",) * 3] * 2  # text, image
    assert fused_attentions(plans["cross_attention_nag"]) == [("bf16",) * 3] * 3  # and NAG's text


def test_what_is_the_same_is_compiled_once(home: Path) -> None:
    """The networks that are float32 at every precision; two processes wanted them at the same time."""
    assert len(SAME) > 3
    fp32, fp8 = (recipes_for(precision, "sm89") for precision in STORED)
    assert {name for name in fp32 if fp32[name].engine.key == fp8[name].engine.key} == SAME
    made = fp32, fp8, recipes_for("fp8", "sm120")
    keys = [recipe.engine.key for recipes in made for recipe in recipes.values()]
    assert len(set(keys)) == len(keys) - len(SAME)
    assert {entry.key for entry in entries() if entry.manifest} == set(keys)


def never(event: object) -> None:
    pytest.fail(f"a dry run reports {event}")


def test_a_build_goes_on_where_it_was_and_needs_no_torch(home: Path) -> None:
    """One engine is missing and one is damaged: these are compiled, the others stay."""
    made = recipes_for("fp8", "sm89")
    head, attn_in = (home / "engines" / f"{made[name].engine.key}.plan" for name in ("head", "attn_in"))
    head.unlink()
    os.truncate(attn_in, 1000)
    flavour = choose_flavour("tensorrt_rtx", None)
    dry = compile_engines(TINY, PLANS["fp8"], "sm89", flavour, never, dry_run=True)
    assert {row.name for row in dry.engines if row.state == "missing"} == {"head", "attn_in"}
    assert not head.exists()

    out, err = start(home, "fp8", "sm89").communicate()
    report = json.loads(out)
    assert set(report["built"]) == {"head", "attn_in"}, err
    assert not report["torch"]
    assert len(gemms(stored("fp8", "sm89")["attn_in"])) == FP8_GEMMS["attn_in"]


@pytest.mark.long
def test_progress_counts_engines(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store with the graphs and no engines. Phases are reported of what takes longer than 0.1 s."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    (tmp_path / "graphs").symlink_to(home / "graphs")
    events: list[Event] = []
    report = compile_engines(TINY, PLANS["fp32"], "sm89", choose_flavour("tensorrt_rtx", None), events.append)
    names = engine_names(TINY, PLANS["fp32"])
    done = [event for event in events if isinstance(event, EngineReady)]
    assert [(e.name, e.number) for e in done] == [(name, n) for n, name in enumerate(names, 1)]
    assert [(e.state, e.seconds, e.bytes) for e in done] == [
        (row.state, row.seconds, row.bytes) for row in report.engines
    ]
    assert {e.engines for e in done} == {len(names)}
    assert all(row.state == "built" and row.seconds > 0 and row.bytes > 0 for row in report.engines)
    steps = [event for event in events if isinstance(event, EngineStep)]
    assert steps and all(e.phase and 0 <= e.step <= e.steps for e in steps)


def test_a_dry_run_without_graphs_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    flavour, plan = choose_flavour("tensorrt_rtx", None), Plan(precision="fp8")
    report = compile_engines(ANIMATE_14B, plan, "sm120", flavour, never, dry_run=True)
    assert [(row.name, row.state) for row in report.engines] == [
        (name, "missing") for name in (*filter(has_engine, networks(ANIMATE_14B, plan)), "attention_fp8")
    ]
    assert report.missing_graphs == tuple(networks(ANIMATE_14B, plan))
    assert not list(tmp_path.iterdir())


def test_fp8_for_a_gpu_without_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="sm86 have no FP8") as caught:
        compile_engines(TINY, Plan(precision="fp8"), "sm86", choose_flavour("tensorrt_rtx", None), never)
    assert "bf16" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_14b_without_weights_in_little_memory(tmp_path: Path) -> None:
    """At 832x480x77 for SM89; the memory is that of the whole process, with torch."""
    names = ("attn_in", "attention", "attn_out", "cross_attention", "ffn", "head")
    command = [sys.executable, "-c", SUBSET, str(tmp_path), *names]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    plans = {path.stem: path.read_bytes() for path in tmp_path.glob("*.plan")}
    print({name: len(plan) for name, plan in plans.items()}, f"bytes, peak memory {run.stdout.strip()} GB")
    assert float(run.stdout) < MEMORY_LIMIT_GB
    contracts = networks(ANIMATE_14B, Plan(832, 480, 77, "fp8"))
    for name in ("attn_in", "attn_out", "ffn"):
        matrices = [t for t in contracts[name].weights if t.dtype == "float8_e4m3fn"]
        weights = sum(t.shape[0] * t.shape[1] for t in matrices)
        assert len(plans[name]) < weights / 50, f"{len(plans[name])} bytes, the weights {weights}"
        assert [gemm[:2] for gemm in gemms(plans[name])] == [FP8] * FP8_GEMMS[name]
    assert fused_attentions(plans["attention"]) == [("bf16",) * 3]
    assert fused_attentions(plans["attention_fp8"]) == [("fp8_e4m3",) * 3]
