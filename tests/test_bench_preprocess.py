"""`trt-wan bench preprocess`: its random networks against published figures, the person planted in them, and
the command as a user runs it without a GPU.
"""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from plan_text import fused_attentions
from tiny_job import as_argv

from trt_wan.benchmarks.measure.graph_flops import counted_flops
from trt_wan.benchmarks.preprocess import (
    bench,
    graph,
    planted,
    plots,
    random_networks,
    tiny_sam2,
    vitpose,
    yolov10,
)
from trt_wan.benchmarks.preprocess.parts import PARTS, PartClock
from trt_wan.cli.main import cli
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.sam2.config import SAM2_MODELS
from trt_wan.errors import InputError, TrtWanError
from trt_wan.preprocess.onnx.file import read_onnx
from trt_wan.preprocess.onnx.recipe import compile_file
from trt_wan.preprocess.people.detect import open_detector
from trt_wan.preprocess.people.person import Box
from trt_wan.preprocess.people.pose import open_pose
from trt_wan.preprocess.sam2.weights import load_sam2

ROOT = Path(__file__).parents[1]
SIZE, FRAMES, REPEAT = (320, 192), 9, 2
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


# --- random networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "flops", "parameters"),
    [
        (yolov10.build(yolov10.MEDIUM), 59.1e9, 15.4e6),  # the YOLOv10 paper's table, and its repository's
        (vitpose.build(vitpose.HUGE, 832 / 480), 245e9, 637e6),  # 2 per multiply and add
    ],
    ids=["yolov10m", "vitpose-h"],
)
def test_full_size_graphs_cost_what_the_real_ones_do(built: Any, flops: float, parameters: float) -> None:
    model, g = built
    assert sum(counted_flops(model)) == pytest.approx(flops, rel=0.05)
    assert sum(int(np.prod(weight.shape)) for weight in g.weights) == pytest.approx(parameters, rel=0.01)


def test_flops_of_a_deconvolution_by_hand() -> None:
    """Each of 2x3x5x7 numbers meets a kernel of 4x3x3."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    kernel = onnx.numpy_helper.from_array(np.zeros((3, 4, 3, 3), np.float32), "w")
    given, result = (helper.make_tensor_value_info(n, kind, s) for n, s in (("x", [2, 3, 5, 7]), ("y", None)))
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [given], [result], [kernel])
    assert counted_flops(helper.make_model(graph)) == (0, 2 * (2 * 3 * 5 * 7) * (4 * 3 * 3))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TRT_WAN_HOME."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def home(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(place))
    return place


def noise(count: int, size: tuple[int, int] = SIZE) -> list[Any]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, size[1], size[0], 3), np.uint8))


def test_the_planted_person_is_found_where_it_is_planted(home: Path) -> None:
    width, height = SIZE
    detector = open_detector(random_networks.random_detector("tiny").path, "onnxruntime", batch=2)
    pose = open_pose(random_networks.random_pose("tiny", width / height).path, "onnxruntime", batch=2)
    frames = noise(3)
    found = detector.detect(frames)
    assert [len(persons) for persons in found] == [1, 1, 1]
    box = found[0][0]
    wanted = np.array(planted.BOX) * (width, height, width, height)
    np.testing.assert_allclose((box.x0, box.y0, box.x1, box.y1), wanted, atol=1)
    for points in pose.estimate(frames, [Box(*map(float, wanted))] * 3):
        np.testing.assert_allclose(points[:, :2], planted.in_frame(width, height), atol=0.5)
        assert 0.8 < points[:, 2].min() <= points[:, 2].max() < 1


def test_what_is_planted_is_a_person_in_the_box() -> None:
    places = planted.joints()
    assert ((places >= 0) & (places <= 1)).all()
    heights = [places[i, 1] for i in (0, 5, 11, 13, 15)]  # nose, shoulder, hip, knee, ankle
    assert heights == sorted(heights)
    assert (places[[1, 5, 9, 15], 0] > 0.5).all() and (places[[2, 6, 10, 16], 0] < 0.5).all()


@pytest.mark.parametrize("name", ["detector", "pose"])
def test_the_networks_own_result_is_part_of_what_comes_out(name: str, home: Path) -> None:
    """Else an optimiser could leave the network out, and nothing would be measured. A detector that has died
    out or is saturated gives the same row everywhere.
    """
    make = (
        random_networks.random_detector
        if name == "detector"
        else lambda m: random_networks.random_pose(m, 1.5)
    )
    session = onnxruntime.InferenceSession(make("tiny").path)
    shape = session.get_inputs()[0].shape[1:]
    first, second = np.random.default_rng(0).random((2, *shape), np.float32)
    (got,) = session.run(None, {"images": np.stack([first, second])})
    if name == "detector":
        own = got[:, 1:, :5]  # nothing is planted there
        assert len(np.unique(own[0].round(9), axis=0)) > 100
        assert (np.abs(own[0] - own[1]) > 1e-7).any() and np.abs(own).max() < 1e-3
    else:
        assert 0 < np.abs(got[0] - got[1]).max() < 1e-4


def test_external_weights_are_the_ones_that_are_described(home: Path) -> None:
    path = random_networks.random_pose("tiny", 1.5).path
    model = onnx.load(path)
    _, g = vitpose.build(vitpose.TINY, 1.5)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for weight in g.weights:
        values = stored[weight.name]
        assert values.shape == weight.shape and np.isfinite(values).all()
        if values.size > 1000:
            assert values.std() == pytest.approx(weight.deviation, rel=0.1)
    assert (path.parent / "end2end.weights").stat().st_size > 4 * sum(np.prod(w.shape) for w in g.weights)


def test_a_network_is_made_once_and_an_old_one_goes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = random_networks.random_detector("tiny").path
    made = first.stat().st_mtime_ns
    assert random_networks.random_detector("tiny").path.stat().st_mtime_ns == made
    monkeypatch.setattr(random_networks, "_source_hash", lambda: "another source")
    second = random_networks.random_detector("tiny").path
    assert second != first and second.exists() and not first.exists()
    assert not list((home / "random").glob("*.partial"))


def test_sam2_files_are_read_as_the_models_they_are(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAM2_MODELS, tiny_sam2.TINY_SAM2.name, tiny_sam2.TINY_SAM2)
    assert load_sam2(random_networks.random_sam2("tiny").path).config == tiny_sam2.TINY_SAM2
    assert len(random_networks.sam2_tensors(random_networks.SAM2["full"])) == 615


@needs_rtx
def test_tensorrt_takes_the_graphs_and_fuses_their_attention(home: Path, tmp_path: Path) -> None:
    """With heads of 80 channels as ViTPose-H has them, not the tiny one's 24."""
    built, g = vitpose.build(vitpose.VitPose("two blocks", 160, 2, 2), 1.5)
    graph.write(built, g.weights, tmp_path / "pose.onnx", 0, beside="weights")
    flavour = choose_flavour(None, None)

    def compiled(path: Path, height: int, width: int) -> bytes:
        return compile_file(flavour, read_onnx(path), (2, 3, height, width), "sm89", lambda *_: None)

    assert fused_attentions(compiled(tmp_path / "pose.onnx", 256, 192)) == [("half", "half", "half")] * 2
    side = yolov10.TINY.side
    plan = compiled(random_networks.random_detector("tiny").path, side, side)
    assert b"dims={ 2 300 6 }" in plan


# --- parts -----------------------------------------------------------------------------------------------


def test_every_part_is_there() -> None:
    """A part that was renamed would go missing from the table."""
    with PartClock().watching() as clock:
        assert clock.missing == []
    assert {part.name for part in PARTS} == set(plots.COLOURS)


def test_a_part_does_not_count_what_it_calls() -> None:
    clock = PartClock()

    def items() -> Iterator[int]:
        for i in range(3):
            with clock.inside("inner"):
                time.sleep(0.02)
            time.sleep(0.01)
            yield i

    watched = clock._around_items("outer", items)
    for _ in islice(watched(), 3):
        time.sleep(0.03)  # whoever uses the items
    own, beside = clock.take()
    assert own["inner"] == pytest.approx(0.06, abs=0.02)
    assert own["outer"] == pytest.approx(0.03, abs=0.02)
    assert beside == {} and clock.take() == ({}, {})


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench-preprocess")


@pytest.fixture(scope="module")
def ran(place: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    """Without the graphs of the tiny SAM2, which the command makes."""
    env = os.environ | {"TRT_WAN_HOME": str(place), "PATH": os.defpath}  # no nvidia-smi, wherever this runs
    size = "x".join(map(str, SIZE))
    options = f"--model tiny --size {size} --frames {FRAMES} --repeat {REPEAT} --executor onnxruntime"
    command = as_argv(f"trt-wan bench preprocess {options} --out {out}")
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def result(ran: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert ran.returncode == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return document


def test_stdout_is_the_document_that_is_written(
    ran: "subprocess.CompletedProcess[str]", result: dict[str, Any], out: Path
) -> None:
    assert len(ran.stdout.splitlines()) == 1
    assert json.loads((out / "preprocess.json").read_text()) == result
    assert result["schema"] == "trt-wan-bench-preprocess/1"
    assert result["frames"] == FRAMES and tuple(result["size"]) == SIZE
    assert "frames/s" in ran.stderr and "trt-wan build --sam2 sam2.1_bench_tiny" in ran.stderr


def test_random_networks_are_said_to_be_random(
    ran: "subprocess.CompletedProcess[str]", result: dict[str, Any], out: Path
) -> None:
    assert result["random"] == ["yolov10-tiny", "vitpose-tiny", "sam2.1_bench_tiny"]
    assert result["sources"]["pose"] == "vitpose-tiny, random weights"
    assert "planted" in result["about_random"] and "planted" in " ".join(ran.stderr.split())
    assert "Random weights" in (out / "preprocess-networks.svg").read_text()


def test_networks_are_timed_as_often_as_was_asked_for(result: dict[str, Any]) -> None:
    assert [row["name"] for row in result["networks"]] == ["detector", "pose", "sam2"]
    for row in result["networks"]:
        assert row["seconds"]["count"] == REPEAT and row["frames"] == FRAMES
        assert row["found"] == FRAMES, "the person is planted in every frame"
        assert result["headlines"][f"{row['name']} frames/s"] == FRAMES / row["seconds"]["median"]
        assert row["host_peak_bytes"] > 50_000_000
    detector, pose, sam2 = result["networks"]
    assert detector["flops"] > pose["flops"] > 1e7 and detector["by_arrays"]["count"] == REPEAT
    assert sam2["by_arrays"] is None and sam2["prompted"] == 4
    inside = {row["name"]: row for row in sam2["inside"]}
    assert inside["encoder"]["calls"] == FRAMES and inside["prompt"]["calls"] == 4
    tracked = sum(row["calls"] for name, row in inside.items() if name.startswith("track_"))
    assert tracked == FRAMES - 4
    whole = sam2["seconds"]["median"]
    assert 0 < sum(row["seconds"] for row in inside.values()) < 2 * whole
    assert "sam2.1_bench_tiny, fp32" in sam2["runs_on"]


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
    assert "SAM2" not in {part["name"] for part in animate["parts"]}
    assert {"SAM2", "cut background"} <= {part["name"] for part in replace["parts"]}
    assert not any("part" in text for text in result["not_measured"])


def test_files_are_complete(result: dict[str, Any], out: Path) -> None:
    for name in ("preprocess-networks", "preprocess-whole"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (out / f"{name}.svg").read_text()
        assert "320x192" in svg and result["card"]["cpu"].split()[0] in svg and "second" in svg
    with (out / "preprocess.csv").open() as file:
        rows = {(row["kind"], row["name"], row["unit"]): row["value"] for row in csv.DictReader(file)}
    assert float(rows["network", "pose", "frames/s"]) == result["headlines"]["pose frames/s"]
    assert float(rows["whole command", "replace", "s"]) == result["headlines"]["replace s, whole command"]
    assert ("replace part", "SAM2", "s") in rows and ("peak host memory", "animate", "B") in rows


def test_random_outlines_hold_the_person(
    result: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else SAM2 is prompted again every few frames, and what is measured is not what real weights do."""
    from trt_wan.benchmarks.preprocess.child import PERSON
    from trt_wan.preprocess.sam2 import model as sam2_model
    from trt_wan.preprocess.sam2.tracker import Sam2Tracker

    monkeypatch.setenv("TRT_WAN_HOME", str(place))
    monkeypatch.setitem(SAM2_MODELS, tiny_sam2.TINY_SAM2.name, tiny_sam2.TINY_SAM2)
    weights = load_sam2(random_networks.random_sam2("tiny").path)
    tracker = Sam2Tracker(sam2_model.open_sam2(weights, "onnxruntime"), frames=5)
    points = planted.in_frame(*SIZE)[[0, 5, 6, 11, 12]]
    tracker.add_points(0, PERSON, points, np.ones(5, np.int64))
    for found in tracker.track(iter(noise(5))):
        mask = found.mask(PERSON)
        assert mask[points[:, 1].astype(int), points[:, 0].astype(int)].mean() > 0.7


# --- wrong usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--size 100x100", "multiple of 16"),
        ("--size small", "not a size"),
        ("--clip {clip} --frames 5", "Give one of them"),
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


def test_a_file_that_is_no_network_is_the_users_mistake(home: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no network at all")
    arguments = f"--model tiny --size 64x48 --frames 2 --mode animate --detector {tmp_path}/broken.onnx"
    refused = CliRunner().invoke(cli, ["bench", "preprocess", *arguments.split()])
    assert refused.exit_code == 1 and "broken.onnx is not an ONNX file" in refused.stderr
    assert "mistake in trt-wan" not in refused.stderr and refused.stdout == ""
