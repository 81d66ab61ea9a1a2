"""Finding people on the GPU: what its kernels make of frames and heat maps is what the host makes of them.

Without a GPU: the kernels compile for every GPU we name, the tables of taps give OpenCV's resize, networks
run on a fake. With one: each kernel against the host's function, then whole networks on TensorRT against ONNX
Runtime, for which the host does what the kernels do.
"""

from pathlib import Path
from typing import Any

import cv2
import fake_gpu
import numpy as np
import onnx_nets
import pytest
from numpy.typing import NDArray
from on_gpu import require_gpu, with_kernels
from onnx import TensorProto, helper

from trt_wan.errors import WeightsError
from trt_wan.preprocess.onnx.memory import PIECE_BYTES, Sender
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.crops import STD, crop_for, cut, normalised, taps
from trt_wan.preprocess.people.detect import open_detector
from trt_wan.preprocess.people.gpu import kernels
from trt_wan.preprocess.people.gpu.batches import pieces
from trt_wan.preprocess.people.gpu.kernels import people_kernels
from trt_wan.preprocess.people.gpu.resampling_tables import WHOLE, Table, crop_table, stretch_taps
from trt_wan.preprocess.people.heatmaps import peaks
from trt_wan.preprocess.people.onnx_people import OnnxPeople
from trt_wan.preprocess.people.person import JOINTS, Box
from trt_wan.preprocess.people.pose import open_pose
from trt_wan.runtime.device.kernels import compile_source
from trt_wan.runtime.events import silent

Array = NDArray[Any]
FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)

SIZES = [
    (480, 832),
    (1080, 1920),
    (640, 640),
    (1280, 1280),
    (37, 53),
    (1, 1),
    (3, 2000),
    (719, 1),
    (300, 400),
]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(with_kernels(tmp_path / "home")))


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# Without a GPU


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_kernels_compile(nvrtc: None, capability: tuple[int, int]) -> None:
    code = bytes(compile_source(kernels.SOURCE, capability, kernels.macros()).code)
    for name in kernels.NAMES:
        assert f".text.{name}".encode() + b"\0" in code


def stretched(frame: Array, width: int, height: int) -> Array:
    """What the kernel `stretch` computes, before the division by 255."""
    columns, rows = stretch_taps(frame.shape[1], frame.shape[0], width, height)
    values = frame.astype(np.int64)

    def across(table: Table) -> Array:
        first = values[:, table["first"]] * table["first_weight"][:, None]
        return np.asarray(first + values[:, table["second"]] * table["second_weight"][:, None])

    def part(which: str) -> Array:
        weight = rows[f"{which}_weight"].astype(np.int64)[:, None, None]
        return np.asarray((weight * (across(columns)[rows[which]] >> 4)) >> 16)

    return (part("first") + part("second") + 2) >> 2


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.long) for k in (1, 2, 3))])
def test_taps_give_opencvs_resize_to_the_last_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [(*map(int, rng.integers(1, 900, 2)), *map(int, rng.integers(1, 700, 2))) for _ in range(30)]
    for height, width, to_height, to_width in [*sizes, *((*size, 640, 640) for size in SIZES)]:
        frame = noise(height, width, seed)
        expected = cv2.resize(frame, (to_width, to_height))
        np.testing.assert_array_equal(
            stretched(frame, to_width, to_height), expected, f"{width}x{height} to {to_width}x{to_height}"
        )


def test_taps_lie_in_the_frame_and_weigh_one() -> None:
    for size in (1, 2, 7, 640, 7680, 32768):
        table, _ = stretch_taps(size, 1, 640, 640)
        assert min(table["first"].min(), table["second"].min()) >= 0
        assert max(table["first"].max(), table["second"].max()) < size
        assert (table["first_weight"] + table["second_weight"] == WHOLE).all()
    for start, end in ((0, 100), (-50, 20), (90, 400), (200, 300), (5, 5)):
        table = crop_table(taps(start, end, 192, 100))
        assert table["first"].min() >= 0 and table["second"].max() < 100


def test_pieces_are_bounded_in_frames_and_pixels() -> None:
    small, large = np.empty((10, 10, 3), np.uint8), np.empty((4320, 7680, 3), np.uint8)
    assert [len(piece) for piece in pieces([small] * 7, 3)] == [3, 3, 1]
    assert [len(piece) for piece in pieces([small, large, small, large, large], 16)] == [3, 1, 1]
    assert list(pieces([], 3)) == []


# Kernels


@pytest.fixture(scope="module")
def gpu() -> Any:
    return require_gpu()


class Memory:
    """Host arrays on the GPU until the test ends."""

    def __init__(self, gpu: Any) -> None:
        self.gpu, self.buffers = gpu, list[Any]()

    def put(self, host: Array) -> int:
        host = np.ascontiguousarray(host)
        self.buffers.append(self.gpu.allocate(max(host.nbytes, 256)))
        address = int(self.buffers[-1].handle)
        self.gpu.write(self.gpu.view(address, (host.nbytes,), np.uint8), host.reshape(-1).view(np.uint8))
        return address

    def get(self, address: int, shape: tuple[int, ...], kind: Any) -> Array:
        return np.asarray(self.gpu.download(self.gpu.view(address, shape, kind)))


def differing(found: Array, expected: Array) -> str:
    wrong = np.argwhere(found.view(np.uint8) != expected.view(np.uint8))
    worst = np.abs(found.astype(np.float64) - expected).max()
    return f"{len(wrong)} bytes of {expected.nbytes} differ, by {worst:.3g} at most, first at {wrong[:1]}"


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("to", [(640, 640), (53, 37)])
def test_a_stretched_frame_is_the_hosts(gpu: Any, kind: np.dtype[Any], to: tuple[int, int]) -> None:
    """Also that nothing is written beside the picture."""
    memory, (width, height) = Memory(gpu), to
    for size in SIZES:
        frame = noise(*size)
        columns, rows = stretch_taps(size[1], size[0], width, height)
        out = memory.put(np.full((5, height, width), -7, kind))
        picture = out + height * width * kind.itemsize
        tables = (memory.put(columns), memory.put(rows))
        people_kernels(gpu).stretch(kind, memory.put(frame), size[1], tables, picture, to)
        found = memory.get(out, (5, height, width), kind)
        expected = np.full((5, height, width), -7, kind)
        resized = cv2.resize(frame, (width, height)).transpose(2, 0, 1).astype(np.float32)
        expected[1:4] = (resized / np.float32(255)).astype(kind)
        assert found.tobytes() == expected.tobytes(), f"{size}: {differing(found, expected)}"


BOXES = [
    Box(100, 50, 300, 650),
    Box(0, 0, 1280, 720),
    Box(-20, 10, 200, 120),
    Box(900, 300, 1275, 718),
    Box(5, 5, 6, 6),
    Box(3, 3, 3, 3),
    Box(2000, 2000, 2100, 2200),
    Box(-5, -5, 1e5, 1e5),
]


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_crop_is_the_hosts(gpu: Any, kind: np.dtype[Any], order: Any) -> None:
    memory, width, height = Memory(gpu), 192, 256
    for size in ((720, 1280), (1, 1), (33, 57)):
        frame = noise(*size)
        address = memory.put(frame)
        for box in BOXES:
            crop = crop_for(box)
            across = crop_table(taps(crop.x0, crop.x1, width, size[1]))
            down = crop_table(taps(crop.y0, crop.y1, height, size[0]))
            out = memory.put(np.full((5, height, width), -7, kind))
            picture = out + height * width * kind.itemsize
            tables = (memory.put(across), memory.put(down))
            people_kernels(gpu).crop(
                kind, address, size[1], tables, picture, (width, height), bgr=order == "bgr"
            )
            found = memory.get(out, (5, height, width), kind)
            expected = np.full((5, height, width), -7, kind)
            expected[1:4] = normalised(cut(frame, crop, width, height), order).astype(kind)
            assert found.tobytes() == expected.tobytes(), f"{size}, {box}: {differing(found, expected)}"


def awkward_maps(height: int, width: int) -> Array:
    """Peaks everywhere, alone and in noise, in front of 0 and of less; ties, plateaus, spikes, empty and tiny
    maps.
    """
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    made = []
    places = [*rng.uniform((-1, -1), (width, height), (60, 2))]
    places += [(x, y) for x in (0, 1, 2, width - 3, width - 2, width - 1) for y in (0, 1, 2, height - 3)]
    for below in (0, 0.3):
        for x, y in places:
            spread = 2 * rng.uniform(0.6, 3) ** 2
            made.append(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / spread) - below)
            made.append(made[-1] + 0.02 * rng.random((height, width)))
    flat = np.ones((height, width))
    twice = np.zeros((height, width))
    twice[20, 30] = twice[20, 31] = twice[40, 7] = 0.5
    plateau = np.zeros((height, width))
    plateau[10:30, 10:30] = 1
    spike = np.zeros((height, width))
    spike[12, 13] = 1
    stripe = np.zeros((height, width))
    stripe[:, 20] = 1  # its first pixel is at the border
    made += [flat, twice, plateau, spike, stripe, 0 * flat, -flat, 1e-12 * spike, 1e-7 * made[0]]
    made += [*rng.standard_normal((20, height, width))]
    return np.array(made, np.float32)


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16])
@pytest.mark.parametrize(("height", "width"), [(64, 48), (96, 72), (45, 41)])
def test_peaks_are_the_hosts(gpu: Any, kind: np.dtype[Any], height: int, width: int) -> None:
    maps = awkward_maps(height, width).astype(kind)
    n = len(maps)
    memory = Memory(gpu)
    out = memory.put(np.full((n + 2, 3), -7, np.float32))
    people_kernels(gpu).decode(kind, memory.put(maps), n, width, height, out + 12)
    found = memory.get(out, (n + 2, 3), np.float32)
    assert (found[[0, -1]] == -7).all(), "something is written before or behind"
    found = found[1:-1]
    expected = peaks(maps[None].astype(np.float32))[0]
    np.testing.assert_array_equal(found[:, 2], expected[:, 2])
    moved = np.abs(expected[:, :2] - np.round(expected[:, :2])).max(1)
    assert (moved > 0.02).sum() > 100, "hardly any peak takes a step"
    # Where the logarithm is cut or noise is decoded, a step may be long, and its error with it.
    step = np.abs(expected[:, :2] - found[:, :2])
    allowed = 2e-3 + 2e-3 * np.abs(expected[:, :2])
    wrong = np.flatnonzero((step > allowed).any(1))
    assert not len(wrong), [(int(k), found[k].tolist(), expected[k].tolist()) for k in wrong[:5]]


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16])
def test_maps_that_are_not_finite_are_told(gpu: Any, kind: np.dtype[Any]) -> None:
    maps = np.zeros((6, 64, 48), kind)
    maps[:, 30, 20] = 1
    for k, value in enumerate((np.nan, np.inf, -np.inf)):
        maps[k, (0, 63, 30)[k], (0, 47, 20)[k]] = value
    maps[4] = np.nan
    memory = Memory(gpu)
    out = memory.put(np.zeros((6, 3), np.float32))
    people_kernels(gpu).decode(kind, memory.put(maps), 6, 48, 64, out)
    finite = np.isfinite(memory.get(out, (6, 3), np.float32)[:, 2])
    assert finite.tolist() == [False, False, False, True, False, True]


def test_frames_of_any_size_arrive(gpu: Any) -> None:
    """In pieces of pinned memory that are used again and again, in order."""
    sender, memory = Sender(gpu), Memory(gpu)
    for size in (1, PIECE_BYTES - 1, PIECE_BYTES, 11 * PIECE_BYTES + 12345):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        address = memory.put(np.zeros(size, np.uint8))
        gpu.sync()
        sender.send(data, address)
        sender.finish()
        assert memory.get(address, (size,), np.uint8).tobytes() == data.tobytes(), size


# Networks


@pytest.fixture(params=["a fake", "a GPU"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake proves what is around engines and kernels: order, places in memory, who waits for what."""
    if request.param == "a fake":
        fake_gpu.install(monkeypatch)
    else:
        request.getfixturevalue("gpu")


ROWS = np.array(
    [(64, 64, 128, 320, 0.5, 0), (320, 64, 448, 576, 0.9, 0), (60, 60, 130, 322, 0.95, 77)], np.float32
)


def lit_frames(count: int) -> list[Array]:
    """Of several sizes and brightnesses."""
    frames = []
    for k in range(count):
        height, width = ((480, 832), (272, 640), (1920, 1080))[k % 3]
        frame = noise(height, width, k) // 4
        frame[..., 0] += np.uint8(20 + 11 * (k % 15))
        frames.append(frame)
    return frames


@pytest.mark.parametrize(("batch", "most"), [("batch", 4), ("batch", 16), (1, 16)])
def test_a_detector_finds_the_same(machine: None, tmp_path: Path, batch: int | str, most: int) -> None:
    """11 frames: the last batch is not full, and there are more batches than slots."""
    path = onnx_nets.detector(tmp_path / "yolo.onnx", ROWS, batch)
    frames = lit_frames(11)
    expected = open_detector(path, "onnxruntime", most).detect(frames)
    detector = open_detector(path, "tensorrt", most)
    assert detector.net.engine is not None and detector.detect([]) == []
    pending = [detector.detecting(frames), detector.detecting(frames[::-1])]
    for found, wanted in ((pending[1](), expected[::-1]), (pending[0](), expected)):
        assert [len(boxes) for boxes in found] == [len(boxes) for boxes in wanted]
        for a, b in zip(sum(found, []), sum(wanted, []), strict=True):
            assert (a.x0, a.y0, a.x1, a.y1) == (b.x0, b.y0, b.x1, b.y1)
            # The score is a mean over 409,600 pixels, summed differently: 2.2e-4 apart on an H100.
            assert abs(a.score - b.score) < 1e-3, (a, b)


def averaging(path: Path, batch: int | str = "batch", kind: int = TensorProto.FLOAT) -> Path:
    """A pose network that averages 4 x 4 pixels: joint k sees channel k mod 3."""
    kernel = np.zeros((JOINTS, 3, 4, 4), np.float32)
    for k in range(JOINTS):
        kernel[k, k % 3] = STD[k % 3] / 16
    nodes = [helper.make_node("Conv", ["images", "kernel"], ["output"], strides=[4, 4])]
    weights = {"kernel": kernel.astype(np.float16 if kind == TensorProto.FLOAT16 else np.float32)}
    return onnx_nets.save(path, nodes, weights, (3, 256, 192), (JOINTS, 64, 48), batch, kind)


def spots(count: int) -> tuple[list[Array], list[Box]]:
    """A red, a green and a blue spot on grey, in another place in each frame."""
    rng, frames, boxes = np.random.default_rng(3), [], []
    for k in range(count):
        height, width = ((600, 800), (480, 832), (900, 700))[k % 3]
        rows, columns = np.mgrid[:height, :width]
        x0, y0 = rng.uniform(10, 100, 2)
        box = Box(x0, y0, x0 + width / 3, y0 + height / 2)
        frame = np.empty((height, width, 3), np.uint8)
        for c in range(3):
            x, y = rng.uniform((box.x0, box.y0), (box.x1, box.y1))
            spread = 2 * (0.05 * height) ** 2
            frame[..., c] = 130 + 120 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / spread)
        frames.append(frame)
        boxes.append(box)
    return frames, boxes


def apart(found: list[Array], expected: list[Array], boxes: list[Box]) -> tuple[float, float]:
    """The largest distance in pixels of a heat map, and the largest difference of scores."""
    pixels = np.array([crop_for(box).size[1] / 64 for box in boxes])[:, None]
    a, b = np.array(found), np.array(expected)
    distance = np.hypot(*(a - b)[..., :2].transpose(2, 0, 1)) / pixels
    return float(distance.max()), float(np.abs(a - b)[..., 2].max())


@pytest.mark.parametrize(("batch", "most"), [("batch", 4), ("batch", 16), (1, 16)])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_pose_network_finds_the_same(
    machine: None, tmp_path: Path, batch: int | str, most: int, order: Any
) -> None:
    path = averaging(tmp_path / "pose.onnx", batch)
    frames, boxes = spots(11)
    expected = open_pose(path, "onnxruntime", order, most).estimate(frames, boxes)
    estimator = open_pose(path, "tensorrt", order, most)
    assert estimator.net.engine is not None and estimator.estimate([], []) == []
    for _ in range(2):
        found = estimator.estimate(frames, boxes)
        assert len(found) == len(expected) and found[0].dtype == np.float32
        distance, scores = apart(found, expected, boxes)
        assert distance < 0.05 and scores < 2e-3, (distance, scores)


def test_a_file_in_half_precision_finds_the_same(machine: None, tmp_path: Path) -> None:
    frames, boxes = spots(5)
    full = averaging(tmp_path / "full.onnx")
    half = averaging(tmp_path / "half.onnx", kind=TensorProto.FLOAT16)
    expected = open_pose(full, "onnxruntime", batch=4).estimate(frames, boxes)
    found = open_pose(half, "tensorrt", batch=4).estimate(frames, boxes)
    distance, scores = apart(found, expected, boxes)
    assert distance < 0.05 and scores < 2e-3, (distance, scores)


def test_a_network_that_overflows_is_said(machine: None, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["some"], strides=[4, 4]),
        helper.make_node("Log", ["some"], ["output"]),
    ]
    weights = {"kernel": -np.ones((JOINTS, 3, 4, 4), np.float32)}
    path = onnx_nets.save(tmp_path / "log.onnx", nodes, weights, (3, 256, 192), (JOINTS, 64, 48))
    estimator = open_pose(path, "tensorrt", batch=2)
    white = np.full((64, 64, 3), 255, np.uint8)
    with pytest.raises(WeightsError, match="log.onnx gives numbers that are not finite"):
        estimator.estimate([white], [Box(20, 20, 40, 40)])


@pytest.mark.parametrize("official", [False, True])
def test_following_gives_the_same(machine: None, tmp_path: Path, official: bool) -> None:
    """40 frames in three batches through both networks; the person is away in some of them."""
    detector = onnx_nets.detector(tmp_path / "yolo.onnx", ROWS[:2])
    pose = averaging(tmp_path / "pose.onnx")
    frames = [noise(480, 832, k) // 2 + np.uint8(100) for k in range(40)]
    for k in range(20, 34):
        frames[k] = np.zeros((480, 832, 3), np.uint8)

    def followed(executor: Any) -> list[Any]:
        networks = open_detector(detector, executor), open_pose(pose, executor)
        return list(OnnxPeople(*networks, official).follow(iter(frames), PersonChoice(), silent))

    found, expected = followed("tensorrt"), followed("onnxruntime")
    assert len(found) == len(expected) == 40
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.box is None) == (b.box is None), k
        if a.box is not None:
            places = [(box.x0, box.y0, box.x1, box.y1) for box in (a.box, b.box)]
            assert places[0] == places[1], k
            np.testing.assert_allclose(a.keypoints[:, 2], b.keypoints[:, 2], atol=5e-3)


def test_an_8k_frame(machine: None, tmp_path: Path) -> None:
    """Its last row lies 99 MB behind its first."""
    frame = noise(4320, 7680)
    frame[-200:, -200:] = 255
    path = averaging(tmp_path / "pose.onnx")
    boxes = [Box(7000, 3600, 7680, 4320), Box(0, 0, 7680, 4320)]
    results = [
        open_pose(path, executor, batch=2).estimate([frame, frame], boxes)  # type: ignore[arg-type]
        for executor in ("tensorrt", "onnxruntime")
    ]
    np.testing.assert_allclose(results[0][0][:, 2], results[1][0][:, 2], atol=5e-3)
    np.testing.assert_allclose(results[0][1][:, 2], results[1][1][:, 2], atol=5e-3)
