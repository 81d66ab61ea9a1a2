"""`trt-wan bench preprocess` as a user runs it without a GPU, with small files of the users' kinds."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_nets
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file
from small_sam2 import SMALL, small_weights
from tiny_job import as_argv

from trt_wan.benchmarks.preprocess import bench
from trt_wan.benchmarks.preprocess.parts import PartClock
from trt_wan.benchmarks.work.graph_flops import counted_flops, file_flops
from trt_wan.cli.main import cli
from trt_wan.errors import InputError, TrtWanError
from trt_wan.preprocess.observe import observed

ROOT = Path(__file__).parents[1]
SIZE, FRAMES, REPEAT = (320, 192), 9, 2


def test_flops_of_a_deconvolution_by_hand() -> None:
    """Each of 2x3x5x7 numbers meets a kernel of 4x3x3."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    kernel = onnx.numpy_helper.from_array(np.zeros((3, 4, 3, 3), np.float32), "w")
    given, result = (helper.make_tensor_value_info(n, kind, s) for n, s in (("x", [2, 3, 5, 7]), ("y", None)))
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [given], [result], [kernel])
    assert counted_flops(helper.make_model(graph)) == (0, 2 * (2 * 3 * 5 * 7) * (4 * 3 * 3))


def test_flops_of_a_frame_of_a_users_file(tmp_path: Path) -> None:
    """One convolution 4x4 over three channels, at 133 x 64 x 48 places. The batch does not count."""
    path = onnx_nets.pose(tmp_path / "pose.onnx", np.zeros((133, 3, 4, 4), np.float32), external="weights")
    (tmp_path / "weights").unlink()
    assert file_flops(path, (16, 3, 256, 192)) == 2 * 133 * 64 * 48 * 3 * 4 * 4


def test_a_part_does_not_count_what_it_calls() -> None:
    clock = PartClock()

    def items() -> Any:
        for i in range(3):
            with clock.inside("pose"):
                time.sleep(0.02)
            time.sleep(0.01)
            yield i

    for _ in observed(items(), "segment", clock.inside):
        time.sleep(0.03)  # the use of an item
    own, beside = clock.take()
    assert own["pose"] == pytest.approx(0.06, abs=0.02)
    assert own["segment"] == pytest.approx(0.03, abs=0.02)
    assert beside == {} and clock.take() == ({}, {})


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench-preprocess")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector and a pose network that find one standing person, and a small SAM2."""
    folder = tmp_path_factory.mktemp("networks")
    box = (240, 80, 400, 560, 1.0, 0)
    onnx_nets.detector(folder / "detector.onnx", np.array([box], np.float32))
    onnx_nets.standing_pose(folder / "pose.onnx")
    save_file(small_weights(), folder / "sam2.safetensors")
    (folder / "sitecustomize.py").write_text("import small_sam2\nsmall_sam2.make_known()\n")
    return folder


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, files: Path, out: Path
) -> "subprocess.CompletedProcess[str]":
    """Without the graphs of the small SAM2, which the command makes. Every process knows its shapes."""
    home = tmp_path_factory.mktemp("home")
    path = os.pathsep.join([str(files), str(ROOT / "tests"), *sys.path])
    env = os.environ | {"TRT_WAN_HOME": str(home), "PATH": os.defpath, "PYTHONPATH": path}  # no nvidia-smi
    networks = f"--detector {files}/detector.onnx --pose {files}/pose.onnx --sam2 {files}/sam2.safetensors"
    options = f"--size {SIZE[0]}x{SIZE[1]} --frames {FRAMES} --repeat {REPEAT} --executor onnxruntime"
    command = as_argv(f"trt-wan bench preprocess {networks} {options} --out {out}")
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def result(ran: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert ran.returncode == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return document


@pytest.mark.long
def test_stdout_is_the_document_that_is_written(
    ran: "subprocess.CompletedProcess[str]", result: dict[str, Any], out: Path
) -> None:
    assert len(ran.stdout.splitlines()) == 1
    assert json.loads((out / "preprocess.json").read_text()) == result
    assert result["schema"] == "trt-wan-bench-preprocess/1"
    assert result["frames"] == FRAMES and tuple(result["size"]) == SIZE
    assert "frames/s" in ran.stderr and f"trt-wan build --sam2 {SMALL.name}" in ran.stderr


@pytest.mark.long
def test_networks_are_timed_as_often_as_was_asked_for(result: dict[str, Any]) -> None:
    assert [row["name"] for row in result["networks"]] == ["detector", "pose", "sam2"]
    for row in result["networks"]:
        assert row["seconds"]["count"] == REPEAT and row["frames"] == FRAMES
        assert row["found"] == FRAMES, "the person is in every frame"
        assert result["headlines"][f"{row['name']} frames/s"] == FRAMES / row["seconds"]["median"]
        assert row["host_peak_bytes"] > 50_000_000
    detector, pose, sam2 = result["networks"]
    assert pose["flops"] == 2 * 133 * 64 * 48 * 3 and detector["by_arrays"]["count"] == REPEAT
    assert sam2["by_arrays"] is None and sam2["prompted"] == 4
    inside = {row["name"]: row for row in sam2["inside"]}
    assert inside["encoder"]["calls"] == FRAMES and inside["prompt"]["calls"] == 4
    tracked = sum(row["calls"] for name, row in inside.items() if name.startswith("track_"))
    assert tracked == FRAMES - 4
    whole = sam2["seconds"]["median"]
    assert 0 < sum(row["seconds"] for row in inside.values()) < 2 * whole
    assert f"{SMALL.name}, fp32" in sam2["runs_on"]


@pytest.mark.long
def test_the_whole_is_the_sum_of_its_parts(result: dict[str, Any]) -> None:
    animate, replace = result["whole"]
    assert (animate["mode"], replace["mode"]) == ("animate", "replace")
    for whole in (animate, replace):
        assert whole["frames"] == FRAMES and tuple(whole["size"]) == SIZE
        seconds = whole["seconds"]["median"]
        assert whole["seconds"]["count"] == whole["command"]["count"] == REPEAT
        halves = whole["finding"]["median"] + whole["writing"]["median"]
        assert 0.7 * seconds < halves < 1.02 * seconds
        named = {part["name"]: part for part in whole["parts"]}
        assert 0.6 * seconds < sum(part["seconds"] for part in named.values()) < 1.1 * seconds
        assert named["encode"]["beside"] > 0 and named["decode"]["beside"] > 0
        assert whole["command"]["median"] > whole["command_work"]["median"] > seconds / 2
    assert "segment" not in {part["name"] for part in animate["parts"]}
    assert {"segment", "cut background"} <= {part["name"] for part in replace["parts"]}


@pytest.mark.long
def test_files_are_complete(result: dict[str, Any], out: Path) -> None:
    for name in ("preprocess-networks", "preprocess-whole"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (out / f"{name}.svg").read_text()
        assert "320x192" in svg and result["card"]["cpu"].split()[0] in svg and "second" in svg
    with (out / "preprocess.csv").open() as file:
        rows = {(row["kind"], row["name"], row["unit"]): row["value"] for row in csv.DictReader(file)}
    assert float(rows["network frames/s", "pose", "frames/s"]) == result["headlines"]["pose frames/s"]
    assert (
        float(rows["whole replace", "whole command, from process start", "s"])
        == result["headlines"]["replace s, whole command"]
    )
    assert ("part replace, beside it", "segment", "s") in rows
    assert ("whole animate", "peak host memory", "B") in rows


# --- wrong usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--detector {clip} --pose {clip} --size 100x100", "multiple of 16"),
        ("--detector {clip} --pose {clip} --size small", "not a size"),
        ("--detector {clip} --pose {clip} --clip {clip} --frames 5", "Give one of them"),
        ("--detector {clip} --pose {clip} --mode replace", "Add --sam2"),
        ("--pose {clip}", "Missing option '--detector'"),
        ("--pose nowhere.onnx", "does not exist"),
        ("--repeat 0", "--repeat"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: str, said: str) -> None:
    clip = ROOT / "trt_wan" / "sample" / "driving.mp4"
    refused = CliRunner().invoke(cli, ["bench", "preprocess", *arguments.format(clip=clip).split()])
    assert refused.exit_code == 2 and said in refused.stderr, refused.output


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom trt_wan.cli.main import cli\n"
        "cli(['bench', 'preprocess', '--help'], standalone_mode=False)\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'cv2', 'av', 'rich', 'torch', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert helped.returncode == 0, helped.stderr
    assert "--detector" in helped.stdout


def test_a_command_that_fails_is_told() -> None:
    error = {"code": InputError.code, "message": "No person.", "hint": "Use another."}
    failed = subprocess.CompletedProcess([], 1, f"{json.dumps({'ok': False, 'error': error})}\n", "")
    with pytest.raises(InputError, match="No person."):
        bench._envelope(failed)
    with pytest.raises(TrtWanError, match="ended with -9"):
        bench._envelope(subprocess.CompletedProcess([], -9, "", "Killed"))


def test_a_file_that_is_no_network_is_the_users_mistake(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    (tmp_path / "broken.onnx").write_bytes(b"no network at all")
    arguments = f"--size 64x48 --frames 2 --detector {tmp_path}/broken.onnx --pose {files}/pose.onnx"
    refused = CliRunner().invoke(cli, ["bench", "preprocess", *arguments.split()])
    assert refused.exit_code == 1 and "broken.onnx is not an ONNX file" in refused.stderr
    assert "mistake in trt-wan" not in refused.stderr and refused.stdout == ""
