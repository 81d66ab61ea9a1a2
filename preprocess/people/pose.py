"""133 joints of the person in a box, with ViTPose wholebody (S to H), in batches.

The network takes a crop [3, 256, 192] around the box and gives a heat map [64, 48] per joint. Crop, decoding
and their constants are the official code's (preprocess_spec.md A1.3): DARK decoding with one Taylor step, a
crop's border is not shifted by half a pixel ("non-UDP").

Where the network runs on TensorRT, the GPU makes the crops and finds the peaks of the heat maps as well, by
the same rules (device/): frames go there as they are, and 133 peaks a frame come back.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.preprocess.onnx.net import Executor, OnnxNet
from trt_wan.preprocess.people.person import JOINTS, Box, Keypoints
from trt_wan.runtime.events import Progress, silent
from trt_wan.runtime.video.reader import Picture

Array = NDArray[Any]
ChannelOrder = Literal["rgb", "bgr"]  # bgr is the official code's, which the network was not trained on

FRAME = (3, 256, 192)
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, for RGB
STD = np.array([0.229, 0.224, 0.225], np.float32)
PADDING = 1.25  # of the box, so that hands and feet at its border are seen whole
BLUR, SIGMA = 11, 2.0  # the kernel's taps; OpenCV's sigma for that many
REACH = BLUR // 2
LEAST_HEAT = 1e-10  # what the logarithm is taken of, at least
LOW_HEAT = 1e-6  # where a value may come near that, once the blurred map is scaled
CROP_THREADS = 4


@dataclass(frozen=True)
class Crop:
    """Centre and size are exact, corners whole pixels of the frame, which may lie outside."""

    centre: tuple[float, float]
    size: tuple[float, float]  # width, height in pixels
    x0: int
    y0: int
    x1: int
    y1: int


class PoseEstimator:
    def __init__(self, net: OnnxNet, channel_order: ChannelOrder = "rgb") -> None:
        _require_pose(net.path.name, net.output_shapes[0])
        self.net, self.channel_order = net, channel_order
        if net.engine is not None:
            from trt_wan.preprocess.people.gpu import batches as people

            people.prepare(net.engine)

    def estimate(self, frames: Sequence[Picture], boxes: Sequence[Box]) -> list[Keypoints]:
        """The joints of the person in each frame's box; to leave a frame out, leave it out of both."""
        return self.estimating(frames, boxes)()

    def estimating(self, frames: Sequence[Picture], boxes: Sequence[Box]) -> Callable[[], list[Keypoints]]:
        """A function that gives what `estimate` does. On a GPU the work begins here, else in the function."""
        _, _, height, width = self.net.input_shape
        crops = [crop_for(box, width, height) for box in boxes]
        if self.net.engine is None:
            return partial(self._estimate_on_host, frames, crops)
        from trt_wan.preprocess.people.gpu import batches as people

        engine = self.net.engine
        shape = engine.shapes[engine.outputs[0]]
        _require_pose(self.net.path.name, shape)
        map_size = (shape[3], shape[2])
        flights, begun = [], 0
        for piece in people.pieces(frames, self.net.batch):
            these = crops[begun : begun + len(piece)]
            begun += len(piece)
            bgr = self.channel_order == "bgr"
            flights.append((people.estimate(engine, piece, these, bgr), these))

        def wait() -> list[Keypoints]:
            found: list[Keypoints] = []
            for flight, these in flights:
                (peaks,) = flight.wait()
                self.net.require_finite(peaks[..., 2])
                found += self._read(peaks, map_size, these)
            return found

        return wait

    def _estimate_on_host(self, frames: Sequence[Picture], crops: Sequence[Crop]) -> list[Keypoints]:
        found: list[Keypoints] = []
        with ThreadPoolExecutor(CROP_THREADS) as pool:
            for outputs in self.net.stream(self._batches(frames, crops, pool)):
                _require_pose(self.net.path.name, outputs[0].shape)
                n, _, height, width = outputs[0].shape
                these = crops[len(found) : len(found) + n]
                found += self._read(peaks(outputs[0]), (width, height), these)
        return found

    def _read(self, found: Array, map_size: tuple[int, int], crops: Sequence[Crop]) -> list[Keypoints]:
        centres, sizes = (np.array([getattr(crop, k) for crop in crops]) for k in ("centre", "size"))
        keypoints = in_frame(found, map_size, centres, sizes)
        keypoints[..., 2] = keypoints[..., 2].clip(0)  # -1 where a map is empty
        return list(keypoints)

    def _batches(
        self, frames: Sequence[Picture], crops: Sequence[Crop], pool: ThreadPoolExecutor
    ) -> Iterator[Array]:
        n, _, height, width = self.net.input_shape

        def prepared(frame: Picture, crop: Crop) -> Array:
            return normalised(cut(frame, crop, width, height), self.channel_order)

        for start in range(0, len(crops), n):
            yield np.stack(list(pool.map(prepared, frames[start : start + n], crops[start : start + n])))


def open_pose(
    path: Path,
    executor: Executor = "auto",
    channel_order: ChannelOrder = "rgb",
    batch: int = 16,
    progress: Progress = silent,
) -> PoseEstimator:
    return PoseEstimator(OnnxNet(path, executor, batch, FRAME, progress), channel_order)


def crop_for(box: Box, width: int = FRAME[2], height: int = FRAME[1]) -> Crop:
    """The part of the frame that the network's `width` x `height` see of a box: 1.25 times the box, widened
    to that aspect.

    The corners come out of a matrix inverse as in the official code: with centre - size / 2, every corner
    that falls between two pixels by half would be rounded differently.
    """
    (cx, cy), aspect = box.centre, width / height
    tall = max(box.width / aspect, box.height) * PADDING
    wide = tall * aspect
    if not tall:  # a box of one point
        return Crop((cx, cy), (0.0, 0.0), round(cx), round(cy), round(cx), round(cy))
    to_network = np.array(
        [
            [width / wide, 0, width * (-cx / wide + 0.5)],
            [0, height / tall, height * (-cy / tall + 0.5)],
            [0, 0, 1],
        ]
    )
    to_frame = np.linalg.inv(to_network)
    x0, y0, _ = (round(float(v)) for v in to_frame @ (0, 0, 1))  # halves to even
    x1, y1, _ = (round(float(v)) for v in to_frame @ (width, height, 1))
    return Crop((cx, cy), (wide, tall), x0, y0, x1, y1)


def cut(frame: Picture, crop: Crop, width: int, height: int) -> Array:
    """The crop at `width` x `height`, float32 [height, width, 3] in 0..255, black outside the frame.

    It equals cv2.resize(INTER_LINEAR) of the whole crop in float32, without ever making that: around a person
    in an 8K frame it takes 1.5 GB.
    """
    rows = taps(crop.y0, crop.y1, height, frame.shape[0])
    columns = taps(crop.x0, crop.x1, width, frame.shape[1])
    result = np.zeros((height, width, 3), np.float32)
    places, nothing = np.empty((height, width, 2), np.int16), np.empty(0, np.int16)
    for y, wy in rows:
        for x, wx in columns:
            places[..., 0], places[..., 1] = x, y[:, None]
            # Twice as fast as numpy's gather, and other threads go on meanwhile.
            tap = cv2.remap(frame, places, nothing, cv2.INTER_NEAREST)
            result += tap * (wy[:, None] * wx)[..., None]
    return result


Taps = list[tuple[NDArray[np.intp], Array]]


def taps(start: int, end: int, size: int, limit: int) -> Taps:
    """For `size` samples between pixels `start` and `end`: the two pixels that each lies between, with their
    weights, which are 0 outside the frame's `limit` pixels.
    """
    length = max(end - start, 1)
    at = (np.arange(size) + 0.5) * (length / size) - 0.5
    low = np.floor(at)
    part = (at - low).astype(np.float32)
    both = []
    for offset, weight in ((0, 1 - part), (1, part)):
        pixel = (low + offset).clip(0, length - 1).astype(np.intp) + start
        inside = (pixel >= 0) & (pixel < limit)
        both.append((pixel.clip(0, limit - 1), weight * inside))
    return both


def normalised(crop: Array, order: ChannelOrder) -> Array:
    """float32 [3, H, W]; mean and deviation stay RGB's in either order, as in the official code."""
    channels = crop if order == "rgb" else crop[..., ::-1]
    return ((channels / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)


def decode_heatmaps(heatmaps: Array, centre: Array, size: Array) -> Keypoints:
    """Heat maps float32 [n, joints, H, W] and each crop's centre and size [n, 2] to keypoints
    [n, joints, 3] in pixels of the frame. A map without anything above 0 gives score -1.
    """
    height, width = heatmaps.shape[2:]
    return in_frame(peaks(heatmaps), (width, height), centre, size)


def peaks(heatmaps: Array) -> Array:
    """Of heat maps float32 [n, joints, H, W]: x and y in pixels of the map, and the score, float32
    [n, joints, 3]. A map without anything above 0 gives -1 for all three.
    """
    n, joints, height, width = heatmaps.shape
    maps = np.ascontiguousarray(heatmaps, np.float32).reshape(n * joints, height, width)
    peak = maps.reshape(n * joints, -1).argmax(1)
    score = np.take_along_axis(maps.reshape(n * joints, -1), peak[:, None], 1)[:, 0]
    y, x = np.divmod(peak, width)
    at = np.stack([x, y], 1).astype(np.float32)
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2) & (score > 0)
    at[inside] += _taylor_step(maps[inside], x[inside], y[inside], score[inside])
    at[score <= 0] = -1
    score = np.where(score > 0, score, np.float32(-1))
    return np.concatenate([at, score[:, None]], 1).reshape(n, joints, 3).astype(np.float32)


def in_frame(found: Array, map_size: tuple[int, int], centre: Array, size: Array) -> Keypoints:
    """What `peaks` gives, in pixels of the frame; `map_size` is (width, height)."""
    scale = (size / map_size).astype(np.float32)[:, None]
    corner = (np.asarray(centre) - np.asarray(size) / 2).astype(np.float32)[:, None]
    return np.concatenate([found[..., :2] * scale + corner, found[..., 2:]], 2).astype(np.float32)


def _taylor_step(maps: Array, x: Array, y: Array, score: Array) -> Array:
    """From the peaks to the maxima of the blurred maps' logarithms, [maps, 2] in heat-map pixels."""
    if not len(maps):
        return np.zeros((0, 2), np.float32)
    log = np.log(np.maximum(_blurred_patches(maps, x, y, score), LEAST_HEAT)).astype(np.float32)
    dx = 0.5 * (log[:, 2, 3] - log[:, 2, 1])
    dy = 0.5 * (log[:, 3, 2] - log[:, 1, 2])
    dxx = 0.25 * (log[:, 2, 4] - 2 * log[:, 2, 2] + log[:, 2, 0])
    dyy = 0.25 * (log[:, 4, 2] - 2 * log[:, 2, 2] + log[:, 0, 2])
    dxy = 0.25 * (log[:, 3, 3] - log[:, 1, 3] - log[:, 3, 1] + log[:, 1, 1])
    determinant = dxx * dyy - dxy**2
    regular = determinant != 0
    divisor = np.where(regular, determinant, 1)
    step = np.stack([dyy * dx - dxy * dy, dxx * dy - dxy * dx], 1) / divisor[:, None]
    return np.where(regular[:, None], -step, 0)


def _blurred_patches(maps: Array, x: Array, y: Array, score: Array) -> Array:
    """The 5 x 5 around each peak of the blurred map, scaled so that the blurred map's maximum is `score`.

    Only what those pixels depend on is blurred. The scale shifts the logarithm by a constant, which the step
    does not see, unless some value meets LEAST_HEAT: only those maps are blurred whole, for their maximum.
    """
    kernel = cv2.getGaussianKernel(BLUR, SIGMA, cv2.CV_32F)[:, 0]
    band = np.zeros((5, 5 + 2 * REACH), np.float32)
    for i in range(5):
        band[i, i : i + BLUR] = kernel
    reach = np.arange(-REACH - 2, REACH + 3)
    rows, columns = y[:, None] + reach, x[:, None] + reach
    height, width = maps.shape[1:]
    flat = rows.clip(0, height - 1)[:, :, None] * width + columns.clip(0, width - 1)[:, None, :]
    flat += (np.arange(len(maps)) * height * width)[:, None, None]
    around = np.take(maps.reshape(-1), flat)  # [maps, 15, 15]
    around *= ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    across = around.reshape(-1, len(reach)) @ band.T
    down = across.reshape(len(maps), len(reach), 5).transpose(0, 2, 1).reshape(-1, len(reach)) @ band.T
    patches = down.reshape(len(maps), 5, 5).transpose(0, 2, 1).copy()
    for i in map(int, np.flatnonzero(patches.min((1, 2)) < 1e-6)):
        whole = cv2.sepFilter2D(maps[i], cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_CONSTANT)
        patches[i] *= score[i] / whole.max()
    return np.asarray(patches)


def _require_pose(name: str, shape: Sequence[int | None]) -> None:
    if len(shape) == 4 and shape[1] in (JOINTS, None):
        return
    given = " x ".join("?" if size is None else str(size) for size in shape)
    meant = "; it looks like a detector" if len(shape) == 3 else ""
    if len(shape) == 4:
        meant = f"; it finds {shape[1]} joints where {JOINTS} are needed"
    raise WeightsError(
        f"{name} is not a whole-body pose network: its output is {given}{meant}.",
        "Use a ViTPose wholebody file, such as vitpose_h_wholebody.onnx.",
    )
