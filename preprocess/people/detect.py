"""Finds persons with YOLOv10m (or another COCO detector of its contract), in batches.

The network sees the whole frame stretched to its input size, RGB in 0..1. Its output is either [n, 300, 6]
with rows of x0, y0, x1, y1, score, class, or [n, 84, 8400] with columns of x, y, width, height and 80 class
scores, both in pixels of its input (preprocess_spec.md A1.2).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.preprocess.onnx.net import Executor, OnnxNet
from trt_wan.preprocess.people.gpu import batches
from trt_wan.preprocess.people.person import Box, iou
from trt_wan.runtime.events import Progress, silent
from trt_wan.runtime.video.reader import Picture

Array = NDArray[Any]

FRAME = (3, 640, 640)
PERSON = 0  # COCO's first class
LEAST_SCORE = 0.05
MOST_OVERLAP = 0.5  # IoU. Of two boxes that overlap more, the lesser is dropped
LEAST_SIDE = 10  # pixels. For a smaller box the official code uses the whole frame


class Detector:
    """`official`: boxes of all classes remove lesser persons that they overlap. Otherwise only persons do."""

    def __init__(self, net: OnnxNet, official: bool = False) -> None:
        _require_detector(net.path.name, net.output_shapes[0])
        self.net, self.official = net, official
        if net.engine is not None:
            batches.prepare(net.engine)

    def detect(self, frames: Sequence[Picture]) -> list[list[Box]]:
        """The persons in each frame, best score first, in whole pixels of the frame."""
        return self.detecting(frames)()

    def detecting(self, frames: Sequence[Picture]) -> Callable[[], list[list[Box]]]:
        """Returns a function with the result of `detect`. On a GPU the work begins here, else in the
        function.
        """
        if self.net.engine is None:
            return partial(self._detect_on_host, frames)
        flights = [
            (batches.detect(self.net.engine, piece), [frame.shape for frame in piece])
            for piece in batches.pieces(frames, self.net.batch)
        ]

        def wait() -> list[list[Box]]:
            found: list[list[Box]] = []
            for flight, sizes in flights:
                (output,) = flight.wait()
                self.net.require_finite(output[: len(sizes)])
                found += self._read(output[: len(sizes)].astype(np.float32, copy=False), sizes)
            return found

        return wait

    def _detect_on_host(self, frames: Sequence[Picture]) -> list[list[Box]]:
        found: list[list[Box]] = []
        for outputs in self.net.stream(self._batches(frames)):
            these = frames[len(found) : len(found) + len(outputs[0])]
            found += self._read(outputs[0], [frame.shape for frame in these])
        return found

    def _read(self, output: Array, sizes: Sequence[tuple[int, ...]]) -> list[list[Box]]:
        _require_detector(self.net.path.name, output.shape)
        return [
            self._persons(rows(of_frame), width, height)
            for of_frame, (height, width, _) in zip(output, sizes, strict=True)
        ]

    def _batches(self, frames: Sequence[Picture]) -> Iterator[Array]:
        n, _, height, width = self.net.input_shape
        for start in range(0, len(frames), n):
            stretched = [cv2.resize(f, (width, height)) for f in frames[start : start + n]]
            yield np.stack(stretched).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)

    def _persons(self, found: Array, width: int, height: int) -> list[Box]:
        _, _, net_height, net_width = self.net.input_shape
        found = found[found[:, 4] > LEAST_SCORE]
        if not self.official:
            found = found[found[:, 5] == PERSON]
        scale = np.array([width / net_width, height / net_height] * 2, np.float32)
        corners = found[:, :4] * scale
        # x, y, width and height are truncated one by one, as the official code does.
        whole = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).astype(np.int32)
        order = np.argsort(-found[:, 4], kind="stable")
        boxes = [
            Box(float(x), float(y), float(x + w), float(y + h), float(score))
            for (x, y, w, h), score in zip(whole[order], found[order, 4], strict=True)
        ]
        kept = without_overlaps(boxes)
        return [boxes[i] for i in kept if found[order[i], 5] == PERSON]


def open_detector(
    path: Path,
    executor: Executor = "auto",
    batch: int = 16,
    official: bool = False,
    progress: Progress = silent,
) -> Detector:
    return Detector(OnnxNet(path, executor, batch, FRAME, progress), official)


def rows(output: Array) -> Array:
    """Either form of output, for one frame, as rows of x0, y0, x1, y1, score, class."""
    if output.shape[-1] == 6:
        return output
    centre, size, scores = output[:2].T, output[2:4].T, output[4:].T
    best = scores.argmax(1)
    score = np.take_along_axis(scores, best[:, None], 1)
    return np.concatenate([centre - size / 2, centre + size / 2, score, best[:, None]], 1)


def without_overlaps(boxes: Sequence[Box]) -> list[int]:
    """Indices of the boxes that no better box overlaps. `boxes` must be sorted, best first."""
    kept: list[int] = []
    for i, box in enumerate(boxes):
        if all(iou(box, boxes[k]) <= MOST_OVERLAP for k in kept):
            kept.append(i)
    return kept


def official_person(boxes: Sequence[Box], width: int, height: int) -> Box:
    """The official choice: the largest person of each frame alone, or the whole frame with score -1.

    A box is skipped if its longer side is below 0.4 of the longest side. After a pick, the longest side is
    the pick's.
    """
    picked: Box | None = None
    longest = max((max(box.width, box.height) for box in boxes), default=0.0)
    for box in boxes:
        side = max(box.width, box.height)
        if (picked is None or box.area > picked.area) and side >= 0.4 * longest:
            picked, longest = box, side
    if picked is None or picked.score <= 0 or min(picked.width, picked.height) < LEAST_SIDE:
        return Box(0.0, 0.0, float(width), float(height), -1.0)
    return picked


def _require_detector(name: str, shape: Sequence[int | None]) -> None:
    rank_fits = len(shape) == 3
    if rank_fits and (shape[2] in (6, None) or (shape[1] in (84, None))):
        return
    given = " x ".join("?" if size is None else str(size) for size in shape)
    meant = "; it looks like a pose network" if len(shape) == 4 else ""
    raise WeightsError(
        f"{name} is not a person detector that is known: its output is {given}{meant}.",
        "Use yolov10m.onnx, whose output is n x 300 x 6.",
    )
