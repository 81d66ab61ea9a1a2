"""133 joints of the person in a box, with ViTPose wholebody (S to H), in batches.

The network takes a crop [3, 256, 192] around the box (crops.py) and gives a heat map [64, 48] per joint
(heatmaps.py). If the network runs on TensorRT, the GPU makes the crops and finds the peaks too, by the same
rules (gpu/): only frames go up, and 133 peaks a frame come back.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.preprocess.onnx.net import Executor, OnnxNet
from trt_wan.preprocess.people.crops import FRAME, ChannelOrder, Crop, crop_for, cut, normalised
from trt_wan.preprocess.people.gpu import batches
from trt_wan.preprocess.people.heatmaps import in_frame, peaks
from trt_wan.preprocess.people.person import JOINTS, Box, Keypoints
from trt_wan.runtime.events import Progress, silent
from trt_wan.runtime.video.reader import Picture

Array = NDArray[Any]

CROP_THREADS = 4


class PoseEstimator:
    def __init__(self, net: OnnxNet, channel_order: ChannelOrder = "rgb") -> None:
        _require_pose(net.path.name, net.output_shapes[0])
        self.net, self.channel_order = net, channel_order
        if net.engine is not None:
            batches.prepare(net.engine)

    def estimate(self, frames: Sequence[Picture], boxes: Sequence[Box]) -> list[Keypoints]:
        """The joints of the person in each frame's box. Both lists must have the same frames."""
        return self.estimating(frames, boxes)()

    def estimating(self, frames: Sequence[Picture], boxes: Sequence[Box]) -> Callable[[], list[Keypoints]]:
        """Returns a function with the result of `estimate`. On a GPU the work begins here, else in the
        function.
        """
        _, _, height, width = self.net.input_shape
        crops = [crop_for(box, width, height) for box in boxes]
        if self.net.engine is None:
            return partial(self._estimate_on_host, frames, crops)
        engine = self.net.engine
        shape = engine.shapes[engine.outputs[0]]
        _require_pose(self.net.path.name, shape)
        map_size = (shape[3], shape[2])
        flights, begun = [], 0
        for piece in batches.pieces(frames, self.net.batch):
            these = crops[begun : begun + len(piece)]
            begun += len(piece)
            bgr = self.channel_order == "bgr"
            flights.append((batches.estimate(engine, piece, these, bgr), these))

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
