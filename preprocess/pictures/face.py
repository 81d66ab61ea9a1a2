"""Crops the driving person's face: one picture of 512x512 per frame, whatever happens to the face.

The box is Wan2.2's: around the 68 points of the face, 1.3 times its area, more room above than below; the
crop is stretched to a square. Wan2.2 crops whatever the pose network says and stops with an error where that
is nothing. Here a face must be seen, boxes are smoothed over time, and a face that is away is held, then
faded to black, which the model takes as no expression.

Boxes are x0, y0, x1, y1 in pixels; the last ones are outside.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.preprocess.people.skeleton import Skeleton
from trt_wan.runtime.video.reader import Picture

SIDE = 512  # px
Compat = Literal["official", "kijai"] | None
PixelBox = tuple[int, int, int, int]
Boxes = NDArray[np.float64]  # [n, 4]; NaN where there is no face

AREA = 1.3  # of the box against the points' own
SURE = 0.3  # the score from which a point counts
ENOUGH = 17  # points of 68: half of those that a profile shows
SMALLEST = 8  # px: less than this, 64 times enlarged, is no face
ALIKE = 0.1  # of the face's size: how far a box may be from the middle of its neighbours and still be jitter


def face_box(skeleton: Skeleton, compat: Compat = None) -> PixelBox | None:
    """The box to crop, inside the picture; None where no face is to be seen.

    `official` takes all points whatever their scores; `kijai` does too, and where that gives no box takes one
    at the top in the middle.
    """
    return _pixels(_box(skeleton, compat), skeleton, compat, padding=0)


@dataclass(frozen=True)
class FaceCropper:
    """`smoothing`: frames on each side that a box is smoothed with, 0 for none. `padding`: px more on every
    side. `hold`, `fade`: frames for which a face that has gone is kept, then faded. With `compat` only the
    padding counts.
    """

    smoothing: int = 4
    padding: int = 0
    hold: int = 6
    fade: int = 6
    compat: Compat = None

    def boxes(self, skeletons: Sequence[Skeleton]) -> list[PixelBox | None]:
        """For all frames of a clip, since smoothing looks ahead."""
        if not skeletons:
            return []
        boxes = np.stack([_box(skeleton, self.compat) for skeleton in skeletons])
        if self.compat is None:
            boxes = smoothed(boxes, self.smoothing)
        return [
            _pixels(box, skeleton, self.compat, self.padding)
            for box, skeleton in zip(boxes, skeletons, strict=True)
        ]

    def crops(self, frames: Iterable[Picture], skeletons: Sequence[Skeleton]) -> Iterator[Picture]:
        """uint8 RGB [512, 512, 3] for each frame, as the frames come. Black until there is a face."""
        last, away = np.zeros((SIDE, SIDE, 3), np.uint8), 0
        for frame, skeleton, box in zip(frames, skeletons, self.boxes(skeletons), strict=True):
            assert frame.shape[:2] == (skeleton.height, skeleton.width), f"{frame.shape} {skeleton.width}"
            if box is None:
                away += 1
                yield self._faded(last, away)
            else:
                last, away = self._crop(frame, box), 0
                yield last

    def _crop(self, frame: Picture, box: PixelBox) -> Picture:
        x0, y0, x1, y1 = box
        # Linear everywhere is the official way; of a face larger than the crop it leaves pixels out.
        shrinks = self.compat is None and min(x1 - x0, y1 - y0) > SIDE
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return np.asarray(
            cv2.resize(frame[y0:y1, x0:x1], (SIDE, SIDE), interpolation=interpolation), np.uint8
        )

    def _faded(self, last: Picture, away: int) -> Picture:
        """The last face as it looks when it has been away for so many frames."""
        if self.compat is not None:
            return np.zeros_like(last)
        light = min(max(1 - (away - self.hold) / (self.fade + 1), 0.0), 1.0)
        return np.asarray(np.rint(last * np.float32(light)), np.uint8)


def smoothed(boxes: Boxes, radius: int) -> Boxes:
    """Without lag: a box is averaged with the middles of pairs, one box before it and one as long after it.

    For a face that moves evenly, however fast, every such middle is where the face is. A pair whose middle is
    elsewhere (a jump, a turn) has no weight: `ALIKE` is twice what a jitter of 2 % of the face amounts to. A
    filter that looks back only, such as One-Euro, has to choose between lag and jitter; a clip need not.
    """
    size = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    total, weights = boxes.copy(), np.ones(len(boxes))
    for step in range(1, min(radius, (len(boxes) - 1) // 2) + 1):
        here = slice(step, -step)
        middle = (boxes[: -2 * step] + boxes[2 * step :]) / 2
        distance = np.linalg.norm(middle - boxes[here], axis=1) / size[here]
        weight = 2 * np.exp(-((distance / ALIKE) ** 2) / 2)
        weight = np.where(np.isnan(weight), 0.0, weight)  # a face that is not there, on either side
        total[here] += weight[:, None] * np.where(weight[:, None] > 0, middle, 0.0)
        weights[here] += weight
    return np.asarray(total / weights[:, None], np.float64)


def _box(skeleton: Skeleton, compat: Compat) -> NDArray[np.float64]:
    """The box [4] before it is cut to the picture; NaN: none."""
    points = skeleton.face[1:].astype(np.float64)  # the first one is the right heel
    none = np.full(4, np.nan)
    if compat is None:
        points = points[points[:, 2] >= SURE]
        if len(points) < ENOUGH:
            return none
    (left, top), (right, bottom) = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
    width, height = right - left, bottom - top
    if min(width, height) < (SMALLEST if compat is None else 1e-6):
        return none
    more = math.sqrt(AREA) - 1
    across, down = width * more / 2, height * more / 4
    return np.array([left - across, top - 3 * down, right + across, bottom + down])


def _pixels(box: NDArray[np.float64], skeleton: Skeleton, compat: Compat, padding: int) -> PixelBox | None:
    width, height = skeleton.width, skeleton.height
    if not np.isnan(box).any():
        wider = box + (-padding, -padding, padding, padding)
        x0, y0, x1, y1 = (int(v) for v in np.clip(wider, 0, (width, height, width, height)))
        if x0 < x1 and y0 < y1:
            return x0, y0, x1, y1
    side = int(min(width, height) * 0.3)
    if compat != "kijai" or side == 0:
        return None
    x, y = (width - side) // 2, int(height * 0.1)
    return x, y, x + side, min(y + side, height)
