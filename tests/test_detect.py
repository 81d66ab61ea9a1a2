"""The detector's rules, and what a user's ONNX file may be: batches open or fixed, external data, folders,
and each way of being wrong.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import fake_gpu
import numpy as np
import onnx
import onnx_nets
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import TensorProto, helper
from plan_text import fused_attentions, gemms, kernels

from trt_wan.cli.main import cli
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.gpu import Target
from trt_wan.engines.store.engines import ensure
from trt_wan.errors import EnvironmentBroken, GraphError, WeightsError
from trt_wan.preprocess.onnx import net as onnx_net
from trt_wan.preprocess.onnx.file import read_onnx
from trt_wan.preprocess.onnx.net import OnnxNet
from trt_wan.preprocess.onnx.recipe import compile_file, recipe_of
from trt_wan.preprocess.people.detect import Detector, official_person, open_detector, rows
from trt_wan.preprocess.people.person import Box

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

# x0, y0, x1, y1 in 640 x 640, score at full brightness, class (0 is a person)
ROWS = np.array(
    [
        (64, 64, 128, 320, 0.5, 0),
        (320, 64, 448, 576, 0.9, 0),
        (322, 66, 450, 570, 0.8, 0),  # the same person again
        (60, 60, 130, 322, 0.95, 77),  # a teddy bear over the first person
        (500, 10, 510, 20, 0.04, 0),
    ],
    np.float32,
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))


def grey(level: int, width: int = 1280, height: int = 320) -> NDArray[np.uint8]:
    return np.full((height, width, 3), (level, 0, 0), np.uint8)


@pytest.mark.parametrize("batch", ["batch", 1, 4])
def test_persons_of_every_frame(tmp_path: Path, batch: int | str) -> None:
    """Seven frames of seven brightnesses through batches of 3, 1 and 4: order, scale, RGB, 0..1, the rest."""
    found = open_detector(onnx_nets.detector(tmp_path / "yolo.onnx", ROWS, batch), "onnxruntime", 3)
    assert found.net.input_shape == (3 if batch == "batch" else batch, 3, 640, 640)
    levels = [255, 204, 153, 102, 51, 12, 255]
    result = found.detect([grey(level) for level in levels])
    for level, boxes in zip(levels, result, strict=True):
        light = level / 255
        expected = [(0.9, (640, 32, 896, 288)), (0.5, (128, 32, 256, 160))]
        kept = [(score * light, place) for score, place in expected if score * light > 0.05]
        assert [(b.x0, b.y0, b.x1, b.y1) for b in boxes] == [place for _, place in kept]
        np.testing.assert_allclose([b.score for b in boxes], [score for score, _ in kept], rtol=1e-3)
    assert [len(boxes) for boxes in result] == [2, 2, 2, 2, 2, 0, 2]


def test_officially_a_teddy_bear_removes_a_person(tmp_path: Path) -> None:
    path = onnx_nets.detector(tmp_path / "yolo.onnx", ROWS)
    (boxes,) = open_detector(path, "onnxruntime", official=True).detect([grey(255)])
    assert [box.x0 for box in boxes] == [640]


def test_whole_pixels_are_cut_off_as_officially(tmp_path: Path) -> None:
    """x, y, width and height are truncated: 3.9 + 7.8 wide ends at 3 + 7, not at 11."""
    path = onnx_nets.detector(tmp_path / "yolo.onnx", np.array([(3.9, 1.2, 11.7, 9.9, 1, 0)], np.float32))
    ((box,),) = open_detector(path, "onnxruntime").detect([grey(255, 640, 640)])
    assert (box.x0, box.y0, box.x1, box.y1) == (3, 1, 10, 9)


def test_the_other_output_form() -> None:
    columns = np.zeros((84, 3), np.float32)
    columns[:4, 1] = (100, 200, 40, 60)
    columns[4 + 7, 1], columns[4, 2] = 0.6, 0.7
    np.testing.assert_allclose(rows(columns)[1], (80, 170, 120, 230, 0.6, 7))
    assert rows(columns)[2, 5] == 0 and rows(ROWS) is ROWS


def test_overlaps_against_opencv() -> None:
    """The boxes that OpenCV's own suppression keeps, on whole pixels."""
    from trt_wan.preprocess.people.detect import without_overlaps

    rng = np.random.default_rng(0)
    for _ in range(20):
        corner, size = rng.integers(0, 60, (40, 2)), rng.integers(5, 60, (40, 2))
        scores = np.sort(rng.random(40))[::-1]
        places = np.concatenate([corner, size], 1)
        kept = cv2.dnn.NMSBoxes(places.tolist(), scores.tolist(), 0.0, 0.5)
        boxes = [Box(*map(float, (*c, *(c + s)))) for c, s in zip(corner, size, strict=True)]
        assert without_overlaps(boxes) == [int(i) for i in kept]


def test_official_person() -> None:
    """The largest in area whose longer side is at least 0.4 of the longest so far picked."""
    slim, broad, small = Box(0, 0, 20, 300, 0.9), Box(50, 0, 150, 130, 0.8), Box(0, 0, 90, 90, 0.7)
    assert official_person([slim, broad, small], 640, 480) == broad
    assert official_person([slim, small], 640, 480) == slim
    assert official_person([], 640, 480) == Box(0, 0, 640, 480, -1)
    assert official_person([Box(0, 0, 9, 200, 0.9)], 640, 480) == Box(0, 0, 640, 480, -1)


def test_a_file_that_leaves_the_size_open(tmp_path: Path) -> None:
    found = open_detector(onnx_nets.detector(tmp_path / "yolo.onnx", ROWS, side="side"), "onnxruntime")
    assert found.net.input_shape == (16, 3, 640, 640)
    assert len(found.detect([grey(255)])[0]) == 2


def test_half_precision_files_run(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["images"], ["output"])]
    path = onnx_nets.save(tmp_path / "h.onnx", nodes, {}, (3, 8, 8), (3, 8, 8), dtype=TensorProto.FLOAT16)
    frames = np.random.default_rng(0).random((5, 3, 8, 8)).astype(np.float32)
    (result,) = OnnxNet(path, "onnxruntime", 2).run(frames)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, -frames, atol=1e-3)


# Files


KERNEL = np.random.default_rng(1).standard_normal((133, 3, 4, 4)).astype(np.float32)


def test_external_data_and_folders(tmp_path: Path) -> None:
    """Alone, with its weights beside it, in a folder, and behind links as in the Hugging Face cache."""
    frames = np.random.default_rng(2).random((3, 3, 256, 192)).astype(np.float32)
    alone = onnx_nets.pose(tmp_path / "alone.onnx", KERNEL)
    (expected,) = OnnxNet(alone, "onnxruntime", 2).run(frames)
    folder = tmp_path / "folder"
    folder.mkdir()
    onnx_nets.pose(folder / "end2end.onnx", KERNEL, external="weights.bin")
    links, blobs = tmp_path / "links", tmp_path / "blobs"
    links.mkdir()
    blobs.mkdir()
    for name, blob in (("end2end.onnx", "1a"), ("weights.bin", "2b")):
        shutil.copy(folder / name, blobs / blob)
        (links / name).symlink_to(blobs / blob)
    assert read_onnx(folder).weight_files == (folder / "weights.bin",)
    for path in (folder, folder / "end2end.onnx", links, links / "end2end.onnx"):
        (result,) = OnnxNet(path, "onnxruntime", 2).run(frames)
        np.testing.assert_array_equal(result, expected)
    hashes = [read_onnx(path).sha256 for path in (alone, folder, links)]
    assert hashes[0] != hashes[1] == hashes[2]
    (only := tmp_path / "only").mkdir()
    shutil.copy(alone, only / "some.onnx")
    assert read_onnx(only).path == only / "some.onnx"


def test_the_hash_is_kept_and_follows_the_weights(tmp_path: Path) -> None:
    path = onnx_nets.pose(tmp_path / "pose.onnx", KERNEL, external="weights.bin")
    first = read_onnx(path).sha256
    (kept,) = (tmp_path / "home" / "onnx").iterdir()
    kept.write_text(kept.read_text().replace(first, "0" * 64))
    assert read_onnx(path).sha256 == "0" * 64  # it was read, not computed
    onnx_nets.pose(path, KERNEL + 1, external="other.bin")
    changed = read_onnx(path).sha256
    assert changed not in (first, "0" * 64)
    kept.write_text("{")
    assert read_onnx(path).sha256 == changed


def refusal(path: Path) -> WeightsError:
    with pytest.raises(WeightsError) as error:
        Detector(OnnxNet(path, "onnxruntime", 2))
    assert error.value.hint
    return error.value


def test_wrong_files_get_one_sentence(tmp_path: Path) -> None:
    good = onnx_nets.detector(tmp_path / "good.onnx", ROWS)
    data = good.read_bytes()
    wrong: dict[str, bytes] = {
        "empty.onnx": b"",
        "page.onnx": b"<!DOCTYPE html><html>404 not found</html>" * 20,
        "noise.onnx": np.random.default_rng(0).bytes(5000),
        "cut.onnx": data[: len(data) // 2],
        "zip.onnx": b"PK\x03\x04" + bytes(400),
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        assert "is not an ONNX file, or is cut short" in refusal(tmp_path / name).message, name
    (tmp_path / "lfs.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in refusal(tmp_path / "lfs.onnx").message
    assert refusal(tmp_path / "none.onnx").message == f"There is no file {tmp_path / 'none.onnx'}."
    (tmp_path / "nothing").mkdir()
    assert "has no ONNX file and no end2end.onnx" in refusal(tmp_path / "nothing").message
    external = onnx_nets.pose(tmp_path / "pose.onnx", KERNEL, external="pose_data.bin")
    (tmp_path / "pose_data.bin").unlink()
    error = refusal(external)
    assert error.message == f"pose.onnx keeps its weights in pose_data.bin, which is not in {tmp_path}."
    assert error.hint == "Put pose_data.bin beside pose.onnx, under that very name."


def test_every_cut_of_a_file_is_refused_or_read(tmp_path: Path) -> None:
    """Whatever the length, no other exception than ours comes out of reading damaged bytes."""
    data = onnx_nets.pose(tmp_path / "a.onnx", KERNEL[:, :, :1, :1]).read_bytes()
    path = tmp_path / "cut.onnx"
    for length in [*range(0, 200), *range(200, len(data), 97)]:
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError):
            read_onnx(path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        for place in rng.integers(0, 400, 3):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            read_onnx(path)
        except WeightsError:
            pass


def test_wrong_inputs_and_outputs(tmp_path: Path) -> None:
    neg = [helper.make_node("Neg", ["images"], ["output"])]
    flat = onnx_nets.save(tmp_path / "flat.onnx", neg, {}, (10,), (10,))
    assert refusal(flat).message == "The input images of flat.onnx is ? x 10, not n x 3 x height x width."
    whole = onnx_nets.save(tmp_path / "i.onnx", neg, {}, (3, 8, 8), (3, 8, 8), dtype=TensorProto.INT32)
    assert "is neither float32 nor float16" in refusal(whole).message
    pose = onnx_nets.pose(tmp_path / "pose.onnx", KERNEL)
    assert refusal(pose).message == (
        "pose.onnx is not a person detector that is known: its output is ? x 133 x 64 x 48; it looks like a "
        "pose network."
    )
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "two",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 3, 8, 8])],
    )
    (tmp_path / "two.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert refusal(tmp_path / "two.onnx").message.startswith("two.onnx has 2 inputs (a, b)")


def test_a_network_that_overflows_is_said(tmp_path: Path) -> None:
    nodes = [helper.make_node("Log", ["images"], ["output"])]
    net = OnnxNet(onnx_nets.save(tmp_path / "log.onnx", nodes, {}, (3, 8, 8), (3, 8, 8)), "onnxruntime", 2)
    with pytest.raises(WeightsError, match="log.onnx gives numbers that are not finite"):
        net.run(-np.ones((1, 3, 8, 8), np.float32))


def test_without_a_gpu_auto_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> Any:
        raise EnvironmentBroken("No CUDA device can be used.")

    monkeypatch.setattr(onnx_net, "_gpu", no_gpu)
    path = onnx_nets.pose(tmp_path / "pose.onnx", KERNEL)
    assert OnnxNet(path, "auto").reason == "ONNX Runtime, CPU (No CUDA device can be used)"
    with pytest.raises(EnvironmentBroken):
        OnnxNet(path, "tensorrt")


def test_weights_that_are_listed_as_inputs(tmp_path: Path) -> None:
    """As files of ONNX before version 1.4 have it."""
    path = onnx_nets.pose(tmp_path / "old.onnx", KERNEL)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("kernel", TensorProto.FLOAT, KERNEL.shape))
    onnx.save(model, path)
    assert [value.name for value in read_onnx(path).inputs] == ["images"]
    assert OnnxNet(path, "onnxruntime", 2).run(np.zeros((1, 3, 256, 192), np.float32))[0].shape[1] == 133


# Engines


def compiled(path: Path, batch: int, target: Target) -> bytes:
    shape = (batch, 3, 256, 192)
    return compile_file(choose_flavour(None, None), read_onnx(path), shape, target, lambda *_: None)


@needs_rtx
@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_products_and_convolutions_are_half(tmp_path: Path, target: Target) -> None:
    """Also proves that the attention stays one kernel, and that the batch is the one that was asked for."""
    plan = compiled(onnx_nets.attention_net(tmp_path / "net.onnx", 0), 6, target)
    assert gemms(plan) and set(gemms(plan)) == {("half", "half", "half")}
    assert fused_attentions(plan) == [("half", "half", "half")]
    convolutions = [k for k in kernels(plan) if k.kind in ("corrltn", "deconvolution")]
    assert len(convolutions) == 4
    assert [k.inputs[0] for k in convolutions].count("half") == 3  # the last gives the result, in float32
    assert b"dims={ 6 133 64 48 }" in plan


@needs_rtx
def test_a_fixed_batch_is_compiled_as_it_is(tmp_path: Path) -> None:
    fixed = onnx_nets.pose(tmp_path / "fixed.onnx", KERNEL, batch=1)
    assert b"dims={ 1 133 64 48 }" in compiled(fixed, 1, "sm89")


@needs_rtx
def test_a_node_that_tensorrt_does_not_know_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Strange", ["images"], ["output"], domain="nobody", name="here")]
    path = onnx_nets.save(tmp_path / "odd.onnx", nodes, {}, (3, 256, 192), (3, 256, 192))
    with pytest.raises(GraphError, match=r"cannot read .*odd\.onnx: here \(Strange\)"):
        compiled(path, 1, "sm89")


@needs_rtx
def test_an_engine_belongs_to_its_file_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flavour = choose_flavour(None, None)
    file = read_onnx(onnx_nets.pose(tmp_path / "a.onnx", KERNEL))
    other = read_onnx(onnx_nets.pose(tmp_path / "b.onnx", KERNEL + 1))
    keys = {
        recipe_of(f, (batch, 3, 256, 192), "sm89", flavour, None).engine.key
        for f in (file, other)
        for batch in (1, 8)
    }
    assert len(keys) == 4
    engine = recipe_of(file, (8, 3, 256, 192), "sm89", flavour, None).engine
    assert engine.title.startswith("engine a.onnx (batch 8, 192x256, fp16, sm89, tensorrt_rtx")
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    ensure(engine, lambda: b"plan")
    listed = CliRunner().invoke(cli, ("list", "--json"))
    (row,) = json.loads(listed.stdout.splitlines()[-1])["data"]["engines"]
    assert (row["kind"], row["network"], row["about"]) == ("onnx", "a.onnx", "batch 8, 192x256")
    assert (row["precision"], row["rebuild"]) == ("fp16", []), "its next use builds it"


def test_batches_on_a_gpu_overlap_and_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host does around an engine, without a GPU: nothing is read before it is there, two batches are
    on their way at a time, and the filling of the last one does not come out.
    """
    gpu = fake_gpu.install(monkeypatch)
    nodes = [
        helper.make_node("Neg", ["images"], ["output"]),
        helper.make_node("ReduceSum", ["images", "axes"], ["sum32"], keepdims=0),
        helper.make_node("Cast", ["sum32"], ["sum"], to=TensorProto.FLOAT16),
    ]
    path = onnx_nets.save(tmp_path / "neg.onnx", nodes, {"axes": np.array([1, 2, 3])}, (3, 4, 4), (3, 4, 4))
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT16, ["batch"]))
    onnx.save(model, path)
    notes: list[Any] = []
    net = OnnxNet(path, "tensorrt", 2, progress=notes.append)
    frames = np.random.default_rng(0).random((7, 3, 4, 4)).astype(np.float32)
    output, sums = net.run(frames)
    np.testing.assert_array_equal(output, -frames)
    np.testing.assert_allclose(sums, frames.sum((1, 2, 3)), rtol=1e-3)
    assert gpu.most_computing == 2
    assert "built engine neg.onnx (batch 2, 4x4, fp16, current, fake 1)" in notes[0].text
    OnnxNet(path, "tensorrt", 2, progress=notes.append)
    assert len(notes) == 1  # the second time it is in the store
