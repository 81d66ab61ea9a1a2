"""`trt-wan bench` as a user runs it without a GPU: the tiny model, everything measured and written.

What it counts is held against the cost table, which test_bench_cost.py holds against the graphs.
"""

import ast
import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_job import PLAN, as_argv

from trt_wan.benchmarks.work.cost import calls
from trt_wan.engines.config import TINY
from trt_wan.runtime.weights.tiny import write_tiny_weights

ROOT = Path(__file__).parents[1]
SHAPE = "--model tiny --size 64x48 --window 13"
# The only modules that may: other people's programs, and a metric that is one of them.
MAY_IMPORT_TORCH = ("peers", "measure/lpips_score.py")


def trt_wan(arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TRT_WAN_HOME": str(home), "PATH": os.defpath}  # no nvidia-smi, wherever this runs
    return subprocess.run(as_argv(f"trt-wan bench {arguments}"), env=env, capture_output=True, text=True)


def last_line(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ran.returncode == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return document


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def ran(tiny_home: Path, out: Path) -> subprocess.CompletedProcess[str]:
    options = "--steps 3 --rounds 2 --job-steps 2 --peers lightx2v --peer-steps 1"
    return trt_wan(f"{SHAPE} {options} --out {out}", tiny_home)


@pytest.fixture(scope="module")
def result(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return last_line(ran)


def test_stdout_is_the_document_that_is_written(
    ran: subprocess.CompletedProcess[str], result: dict[str, Any], out: Path
) -> None:
    assert len(ran.stdout.splitlines()) == 1
    assert json.loads((out / "bench.json").read_text()) == result
    assert result["schema"] == "trt-wan-bench/1"
    assert "64x48x13" in ran.stderr and "s/step" in ran.stderr


def test_steps_are_as_many_as_were_asked_for(result: dict[str, Any]) -> None:
    assert [len(seconds) for seconds in result["steps"]["rounds"]] == [3, 3]
    spread = result["steps"]["seconds"]
    assert spread["count"] == 6 and 0 < spread["p10"] <= spread["median"] <= spread["p90"]
    assert len(result["warm"]["steps"]) == 2 and result["warm"]["frames"] == PLAN.frames


def test_the_calls_of_a_job_are_those_of_the_cost_table(result: dict[str, Any]) -> None:
    counted: Counter[str] = Counter()
    for row in result["warm"]["networks"]:
        counted[row["name"]] += row["calls"]
    counted.pop("sampler")
    expected = {name: n.step * 2 + n.window + n.job for name, n in calls(TINY, PLAN, steps=2).items()}
    assert counted == {name: count for name, count in expected.items() if count}
    profiled = {row["name"]: row["calls"] for row in result["steps"]["networks"]}
    assert {name: n.step for name, n in calls(TINY, PLAN, 2).items() if n.step}.items() <= profiled.items()


def test_times_add_up(result: dict[str, Any]) -> None:
    """Stages are all of the job, networks are inside their stages, a start is longer than its first step."""
    warm = result["warm"]
    assert sum(warm["stages"].values()) == pytest.approx(warm["seconds"], rel=0.05)
    for stage, seconds in warm["stages"].items():
        inside = sum(row["seconds"] for row in warm["networks"] if row["stage"] == stage)
        assert inside <= seconds, stage
    assert warm["process_seconds"] > warm["first_step_seconds"] > warm["steps"][0]
    assert set(warm["stages"]) >= {"text", "image", "condition", "denoise", "decode", "write"}
    assert warm["host_peak_bytes"] > 50_000_000
    assert set(warm["stages_cpu"]) == set(warm["stages"]) and warm["writing_seconds"] > 0
    assert 0 < sum(warm["stages_cpu"].values()) < warm["cpu_seconds"]
    assert result["steps"]["bound_seconds"] > 0


def test_a_peer_that_did_not_run(result: dict[str, Any]) -> None:
    (lightx2v,) = result["peers"]
    assert not lightx2v["ran"] and "checkout" in lightx2v["reason"]
    assert any(text.startswith("cold start") for text in result["not_measured"])


@pytest.mark.long
def test_a_peer_that_ran(tiny_home: Path, tmp_path: Path) -> None:
    """80 s, most of them for diffusers' faces in bf16. test_bench_parts.py has made-up peers that ran."""
    options = "--steps 1 --rounds 2 --job-steps 1 --peers diffusers_eager,lightx2v --peer-steps 1"
    eager, lightx2v = last_line(trt_wan(f"{SHAPE} {options} --out {tmp_path}", tiny_home))["peers"]
    assert eager["ran"] and [len(seconds) for seconds in eager["rounds"]] == [1, 1]
    assert eager["settings"]["compilation"] == "none" and not lightx2v["ran"]
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_files_are_complete(ran: subprocess.CompletedProcess[str], out: Path) -> None:
    for name in ("waterfall", "stages"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "tiny 64x48x13" in (out / f"{name}.svg").read_text()
    with (out / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows if row["kind"] == "network s a step"} >= {"attention", "attn_in"}


def test_a_result_compared_with_itself_and_with_another_shape(
    result: dict[str, Any], out: Path, tiny_home: Path
) -> None:
    itself = last_line(trt_wan(f"compare {out}/bench.json {out}/bench.json", tiny_home))
    assert {row["ratio"] for row in itself["ratios"]} == {1.0}
    other = {**result, "shape": {**result["shape"], "width": 80}}
    (out / "other.json").write_text(json.dumps(other))
    refused = trt_wan(f"compare {out}/bench.json {out}/other.json", tiny_home)
    assert refused.returncode == 2 and "cannot be compared" in refused.stderr


@pytest.mark.long
def test_quality_beside_its_noise_floor(tiny_home: Path, tmp_path: Path) -> None:
    """On the CPU we are the reference: no difference at all, and the floor is float32's rounding."""
    quality = last_line(trt_wan(f"quality {SHAPE} --steps 2 --out {tmp_path}", tiny_home))
    ours, floor = quality["rows"]
    assert ours["frames"] and quality["between"] == {}
    assert ours["velocity_errors"] == [0.0, 0.0] and ours["psnr"] is None
    assert all(0 < error < 1e-5 for error in floor["velocity_errors"])
    assert floor["psnr"] > 60 and floor["ssim"] > 0.999
    assert quality["weights"].startswith("random")
    assert (tmp_path / "quality.png").exists()


@pytest.mark.long
def test_the_vae_is_that_of_diffusers(tiny_home: Path, tmp_path: Path) -> None:
    write_tiny_weights(tmp_path, seed=3)
    measured = last_line(trt_wan(f"vae {SHAPE} --weights {tmp_path} --repeats 2", tiny_home))
    ours, peer = measured["rows"]
    assert peer["name"] == "diffusers float32" and measured["not_measured"] == []
    assert 0 < ours["decode_error"] < 1e-5 and 0 < ours["encode_error"] < 1e-5 and ours["psnr"] > 100
    assert ours["decode"] >= ours["decode_networks"] > 0 and ours["encode"] >= ours["encode_networks"] > 0


@pytest.mark.long
def test_a_window_is_the_sum_of_its_parts(tiny_home: Path) -> None:
    measured = last_line(trt_wan(f"window {SHAPE} --steps 2 --windows 3", tiny_home))
    calls = {part["name"]: part["calls"] for part in measured["parts"] if part["calls"]}
    assert measured["window"] == 2 and calls["attention"] == 2 * TINY.transformer.layers
    assert calls["vae_encode_first"] == 2 and calls["motion_encoder"] == -(-13 // PLAN.face_batch)
    assert sum(part["seconds"] for part in measured["parts"]) == pytest.approx(measured["seconds"], rel=0.02)
    assert {part["name"] for part in measured["once"]} >= {"text_encoder_layer", "context_kv"}
    assert all(
        part["floor_seconds"]
        for part in measured["parts"]
        if part["name"] in calls and part["name"] != "sampler"
    )


def test_wrong_usage_is_one_sentence(tiny_home: Path) -> None:
    for arguments, said in (
        (f"{SHAPE} --peers nobody", "none of diffusers_eager"),
        ("--model tiny --size 64", "not a size"),
        ("--model tiny --window 14 --size 64x48", "14 frames is not possible"),
        ("sweep --axes colour", "none of size, window"),
        (f"quality {SHAPE} --peers", "Peers need weights in files"),
        (f"quality {SHAPE} --row 'fast; attention=magic'", "no candidate called 'magic'"),
        (f"quality {SHAPE} --row quick", "quick"),
        (f"vae {SHAPE}", "Name their folder with --weights DIR."),
    ):
        refused = trt_wan(arguments, tiny_home)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr


def test_nothing_of_ours_imports_torch() -> None:
    """Measuring with torch in the process would measure torch's memory and start as well."""
    heavy = {"torch", "diffusers", "transformers", "lpips"}
    files = [path for path in (ROOT / "benchmarks").rglob("*.py") if "__pycache__" not in path.parts]
    for path in files:
        if path.relative_to(ROOT / "benchmarks").as_posix().startswith(MAY_IMPORT_TORCH):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.split(".")[0] for name in names}, path
    names = ("bench", "measure.measured_process", "measure.record_velocities")
    loaded = "import sys, " + ", ".join(f"trt_wan.benchmarks.{name}" for name in names)
    code = f"{loaded}\nassert not {heavy} & set(sys.modules), sorted({heavy} & set(sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
