"""Crops and the decoding of heat maps: golden values of the official code, the same computed the slow way,
and joints that go through a whole estimate and come back.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx_nets
import pytest
from numpy.typing import NDArray
from on_gpu import require_gpu

from trt_wan.errors import WeightsError
from trt_wan.preprocess.onnx.net import OnnxNet
from trt_wan.preprocess.people.crops import MEAN, STD, Crop, crop_for, cut, normalised
from trt_wan.preprocess.people.heatmaps import decode_heatmaps
from trt_wan.preprocess.people.person import JOINTS, Box
from trt_wan.preprocess.people.pose import PoseEstimator, open_pose

Array = NDArray[Any]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "pose.json").read_text())


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("row", GOLDEN["crop"])
def test_crop_corners_are_the_official_ones(row: dict[str, Any]) -> None:
    crop = crop_for(Box(*map(float, row["bbox"])))
    assert list(crop.centre) == row["center"]
    np.testing.assert_allclose(np.array(crop.size) / 200, row["scale"], rtol=1e-12)
    assert [crop.y1 - crop.y0, crop.x1 - crop.x0, 3] == row["crop_shape"]
    # The part of the frame that is in the crop, in the frame's and in the crop's pixels (x, then y).
    inside = [[max(crop.x0, 0), min(crop.x1, 1280)], [max(crop.y0, 0), min(crop.y1, 720)]]
    assert inside == row["old"]
    assert [[v - crop.x0 for v in inside[0]], [v - crop.y0 for v in inside[1]]] == row["new"]


def test_decoding_gives_the_official_values() -> None:
    golden = GOLDEN["heatmap_decode"]
    rows, columns = np.mgrid[:64, :48]
    maps = np.empty((1, len(golden["pos"]), 64, 48), np.float32)
    for k, (x, y) in enumerate(golden["pos"]):
        distance = (columns - x) ** 2 + (rows - y) ** 2
        maps[0, k] = golden["amp"] * np.exp(-distance / (2 * golden["sigma"] ** 2))
    maps[0, 5] = -1
    size = np.array([golden["scale"]]) * 200
    (found,) = decode_heatmaps(maps, np.array([golden["center"]]), size)
    np.testing.assert_allclose(found[:, :2], golden["preds"], atol=2e-4)
    np.testing.assert_allclose(found[:, 2], golden["maxvals"], atol=1e-5)


def slow_decode(heatmap: Array) -> tuple[float, float]:
    """One map, blurred whole by OpenCV, in heat-map pixels."""
    height, width = heatmap.shape
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    if not 1 < x < width - 2 or not 1 < y < height - 2:
        return float(x), float(y)
    blurred = cv2.GaussianBlur(np.pad(heatmap, 5), (11, 11), 0)[5:-5, 5:-5]
    log = np.log(np.maximum(blurred * heatmap.max() / blurred.max(), 1e-10)).astype(np.float64)
    slope = 0.5 * np.array([log[y, x + 1] - log[y, x - 1], log[y + 1, x] - log[y - 1, x]])
    xx = 0.25 * (log[y, x + 2] - 2 * log[y, x] + log[y, x - 2])
    yy = 0.25 * (log[y + 2, x] - 2 * log[y, x] + log[y - 2, x])
    xy = 0.25 * (log[y + 1, x + 1] - log[y - 1, x + 1] - log[y + 1, x - 1] + log[y - 1, x - 1])
    step = np.linalg.solve([[xx, xy], [xy, yy]], slope)
    return float(x - step[0]), float(y - step[1])


@pytest.mark.parametrize("below", [0.0, 0.3])
def test_decoding_a_batch_against_one_map_at_a_time(below: float) -> None:
    """Peaks everywhere, with noise; with `below`, what is around is negative, where the logarithm is cut."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :48]
    maps = np.empty((3, 40, 64, 48), np.float32)
    for index in np.ndindex(3, 40):
        x, y = rng.uniform((-1, -1), (48, 64))
        peak = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * rng.uniform(0.6, 3) ** 2))
        maps[index] = peak + 0.02 * rng.random((64, 48)) - below
    centre, size = np.array([(24.0, 32.0)] * 3), np.array([(48.0, 64.0)] * 3)
    found = decode_heatmaps(maps, centre, size)
    slow = np.array([[slow_decode(m) for m in frame] for frame in maps])
    near = np.abs(slow - found[..., :2]).max(-1)
    steps = np.abs(slow - np.round(slow)).max(-1)
    assert (steps > 0.05).sum() > 60
    np.testing.assert_allclose(near, 0, atol=5e-3)
    np.testing.assert_array_equal(found[..., 2], maps.max((2, 3)))


@pytest.mark.parametrize(
    "box",
    [
        Box(100, 50, 300, 650),
        Box(0, 0, 1280, 720),
        Box(-20, 10, 200, 120),
        Box(900, 300, 1275, 718),
        Box(5, 5, 6, 6),
        Box(2000, 2000, 2100, 2200),
    ],
)
def test_a_cut_equals_opencvs_resize_of_the_whole_crop(box: Box) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)
    crop = crop_for(box)
    canvas = np.zeros((crop.y1 - crop.y0, crop.x1 - crop.x0, 3), np.float32)
    for y in range(max(crop.y0, 0), min(crop.y1, 720)):
        x0, x1 = max(crop.x0, 0), min(crop.x1, 1280)
        if x0 < x1:
            canvas[y - crop.y0, x0 - crop.x0 : x1 - crop.x0] = frame[y, x0:x1]
    expected = cv2.resize(canvas, (192, 256), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(cut(frame, crop, 192, 256), expected, atol=2e-4)


@pytest.mark.parametrize("box", [Box(0, 0, 1, 1), Box(0, 0, 0, 0), Box(3, 3, 3, 3), Box(-5, -5, 1e5, 1e5)])
def test_any_box_of_a_frame_of_one_pixel(box: Box) -> None:
    frame = np.full((1, 1, 3), 7, np.uint8)
    result = cut(frame, crop_for(box), 192, 256)
    assert result.shape == (256, 192, 3)
    assert np.isfinite(result).all() and result.max() <= 7.001


def test_an_8k_frame_makes_no_canvas() -> None:
    import tracemalloc

    frame = np.zeros((4320, 7680, 3), np.uint8)
    crop = crop_for(Box(0, 0, 7680, 4320))
    assert (crop.y1 - crop.y0) * (crop.x1 - crop.x0) * 12 > 1e9  # bytes in float32
    tracemalloc.start()
    cut(frame, crop, 192, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_channel_order() -> None:
    crop = np.zeros((2, 2, 3), np.float32)
    crop[...] = (255, 51, 0)
    values = np.array([1, 0.2, 0])
    np.testing.assert_allclose(normalised(crop, "rgb")[:, 0, 0], (values - MEAN) / STD, rtol=1e-6)
    np.testing.assert_allclose(normalised(crop, "bgr")[:, 0, 0], (values[::-1] - MEAN) / STD, rtol=1e-6)


class KnownJoints:
    """In place of a network: heat maps around the places where known joints lie in each crop."""

    def __init__(self, joints: Array, crops: list[Crop], batch: int) -> None:
        self.joints, self.crops, self.path = joints, crops, Path("known.onnx")
        self.input_shape, self.output_shapes = (batch, 3, 256, 192), ((None, JOINTS, 64, 48),)
        self.given, self.engine = 0, None

    def stream(self, batches: Any) -> Any:
        for batch in batches:
            maps = np.empty((len(batch), JOINTS, 64, 48), np.float32)
            rows, columns = np.mgrid[:64, :48]
            for i in range(len(batch)):
                crop, joints = self.crops[self.given + i], self.joints[self.given + i]
                corner = np.subtract(crop.centre, np.array(crop.size) / 2)
                for k, (x, y) in enumerate((joints[:, :2] - corner) * (48, 64) / crop.size):
                    distance = (columns - x) ** 2 + (rows - y) ** 2
                    maps[i, k] = joints[k, 2] * np.exp(-distance / 8)
            self.given += len(batch)
            yield [maps]


def test_known_joints_come_back_from_their_heat_maps() -> None:
    """Five frames of three sizes, in batches of two; the last joint is nowhere."""
    rng = np.random.default_rng(0)
    sizes = [(720, 1280), (272, 640), (1920, 1080), (272, 640), (720, 1280)]
    frames = [np.zeros((*size, 3), np.uint8) for size in sizes]
    boxes, joints = [], []
    for height, width in sizes:
        x0, y0 = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
        box = Box(x0, y0, x0 + width / 3, y0 + height / 3)
        places = rng.uniform((box.x0, box.y0), (box.x1, box.y1), (JOINTS, 2))
        boxes.append(box)
        joints.append(np.concatenate([places, rng.uniform(0.4, 1, (JOINTS, 1))], 1))
        joints[-1][-1, 2] = -0.5
    net: Any = KnownJoints(np.array(joints), [crop_for(box) for box in boxes], 2)
    found = PoseEstimator(net).estimate(frames, boxes)
    assert len(found) == 5
    for got, expected, box in zip(found, joints, boxes, strict=True):
        assert got.dtype == np.float32 and got[-1, 2] == 0
        pixel = crop_for(box).size[1] / 64  # of a heat map, in the frame
        np.testing.assert_allclose(got[:-1, :2], expected[:-1, :2], atol=0.06 * pixel)
        assert (got[:-1, 2] > 0.85 * expected[:-1, 2]).all()


@pytest.mark.parametrize("batch", ["batch", 1])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_bright_spot_is_found_where_it_is(tmp_path: Path, batch: int | str, order: Any) -> None:
    """A real ONNX file that averages 4 x 4 pixels: joint k sees channel k mod 3. A red, a green and a blue
    spot lie apart, so a mirrored or swapped axis, colour or frame shows.
    """
    kernel = np.zeros((JOINTS, 3, 4, 4), np.float32)
    for k in range(JOINTS):
        kernel[k, k % 3] = STD[k % 3] / 16
    estimator = open_pose(
        onnx_nets.pose(tmp_path / "pose.onnx", kernel, batch), "onnxruntime", order, batch=2
    )
    spots = np.array([(400.0, 210.0), (520.0, 330.0), (460.0, 450.0)])
    rows, columns = np.mgrid[:600, :800]
    dark = np.ceil(255 * (MEAN if order == "rgb" else MEAN[::-1]))  # what a normalised 0 is
    frames, boxes = [], []
    for i in range(3):
        frame = np.empty((600, 800, 3), np.uint8)
        for c, (x, y) in enumerate(spots + 10 * i):
            spot = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 1000)
            frame[..., c] = dark[c] + (255 - dark[c]) * spot
        frames.append(frame)
        boxes.append(Box(360, 150, 580, 520 + i))
    found = estimator.estimate(frames, boxes)
    for i, keypoints in enumerate(found):
        pixel = crop_for(boxes[i]).size[1] / 64
        # A map's first pixel covers the crop's first four: "non-UDP" takes its middle for its corner.
        expected = spots[:: 1 if order == "rgb" else -1] + 10 * i + 0.5 - pixel / 2
        np.testing.assert_allclose(keypoints[:3, :2], expected, atol=0.15 * pixel)
        np.testing.assert_allclose(keypoints[3:, :2], keypoints[np.arange(3, JOINTS) % 3, :2], atol=1e-3)


def test_other_pose_networks_are_refused(tmp_path: Path) -> None:
    body = onnx_nets.pose(tmp_path / "body.onnx", np.zeros((17, 3, 4, 4), np.float32), joints=17)
    with pytest.raises(WeightsError) as error:
        open_pose(body, "onnxruntime")
    assert error.value.message.endswith(
        "its output is ? x 17 x 64 x 48; it finds 17 joints where 133 are needed."
    )
    yolo = onnx_nets.detector(tmp_path / "yolo.onnx", np.zeros((1, 6), np.float32))
    with pytest.raises(WeightsError, match="it looks like a detector"):
        open_pose(yolo, "onnxruntime")


def test_no_frames(tmp_path: Path) -> None:
    path = onnx_nets.pose(tmp_path / "pose.onnx", np.zeros((JOINTS, 3, 4, 4), np.float32))
    assert open_pose(path, "onnxruntime").estimate([], []) == []


def test_on_a_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    """fp16 products against fp32; 11 frames in batches of 4, the last one not full."""
    require_gpu()
    path = onnx_nets.attention_net(tmp_path / "net.onnx", 0)
    frames = np.random.default_rng(0).standard_normal((11, 3, 256, 192)).astype(np.float32)
    (expected,) = OnnxNet(path, "onnxruntime", 4).run(frames)
    net = OnnxNet(path, "tensorrt", 4)
    for _ in range(2):
        (result,) = net.run(frames)
        assert result.shape == expected.shape
        got, want = (values.reshape(len(frames), -1) for values in (result, expected))
        error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() < 5e-3, error
