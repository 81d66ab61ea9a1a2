"""Crops the driving person's face: one picture of 512x512 for every frame.

The box is Wan2.2's: around the 68 points of the face, 1.3 times their area, with more room above than below.
The crop is stretched to a square. Wan2.2 crops at any points of the pose network and stops with an error if
the box is empty. Here a face must be seen, boxes are smoothed over time, and a missing face is held, then
faded to black, which means no expression to the model.

Boxes are x0, y0, x1, y1 in pixels. x1 and y1 are outside.
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
Boxes = NDArray[np.float64]  # [n, 4], NaN without a face

AREA = 1.3  # ratio of the box to the area of the points
SURE = 0.3  # least score of a point that counts
ENOUGH = 17  # points of 68: half of the points in a profile
SMALLEST = 8  # px: a smaller face would be enlarged more than 64 times
ALIKE = 0.1  # times the face's size: distance of a box from its neighbours' middle that is still jitter


def face_box(skeleton: Skeleton, compat: Compat = None) -> PixelBox | None:
    """The box to crop, inside the picture. None if no face is seen.

    `official` uses points of any score. So does `kijai`, which uses a box at the top centre if there is none.
    """
    return _pixels(_box(skeleton, compat), skeleton, compat, padding=0)


@dataclass(frozen=True)
class FaceCropper:
    """`smoothing`: frames on each side for smoothing, 0 for none. `padding`: extra px on every side. `hold`,
    `fade`: frames for which a missing face is kept, then faded. With `compat` only the padding is used.
    """

    smoothing: int = 4
    padding: int = 0
    hold: int = 6
    fade: int = 6
    compat: Compat = None

    @property
    def without(self) -> str:
        """The content of a crop without a face, in words."""
        if self.compat is not None:
            return "the face clip is black"
        return f"the face clip shows the last face for {self.hold} frames and then fades to black"

    def boxes(self, skeletons: Sequence[Skeleton]) -> list[PixelBox | None]:
        """The boxes of all frames of a clip. Smoothing looks ahead, so all are made at once."""
        if not skeletons:
            return []
        boxes = np.stack([_box(skeleton, self.compat) for skeleton in skeletons])
        if self.compat is None:
            boxes = smoothed(boxes, self.smoothing)
        return [
            _pixels(box, skeleton, self.compat, self.padding)
            for box, skeleton in zip(boxes, skeletons, strict=True)
        ]

    def cuts(self, frames: Iterable[Picture], skeletons: Sequence[Skeleton]) -> Iterator[Picture | None]:
        """The part of each frame that `crops` needs, as the frames come: the pixels of the face, never more
        than those of a crop. None without a face.
        """
        for frame, skeleton, box in zip(frames, skeletons, self.boxes(skeletons), strict=True):
            assert frame.shape[:2] == (skeleton.height, skeleton.width), f"{frame.shape} {skeleton.width}"
            yield self.cut(frame, box)

    def cut(self, frame: Picture, box: PixelBox | None) -> Picture | None:
        """The part of one frame. Its box is one of `boxes`."""
        if box is None:
            return None
        x0, y0, x1, y1 = box
        face = frame[y0:y1, x0:x1]
        return self._square(face) if face.size > SIDE * SIDE * 3 else face.copy()

    def crops(self, cuts: Iterable[Picture | None]) -> Iterator[Picture]:
        """uint8 RGB [512, 512, 3] for each frame. Black until there is a face."""
        last, away = np.zeros((SIDE, SIDE, 3), np.uint8), 0
        for face in cuts:
            if face is None:
                away += 1
                yield self._faded(last, away)
            else:
                last, away = self._square(face), 0
                yield last

    def _square(self, face: Picture) -> Picture:
        if face.shape[:2] == (SIDE, SIDE):
            return face
        # The official code is always linear, which skips pixels of a face larger than the crop.
        shrinks = self.compat is None and min(face.shape[:2]) > SIDE
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(face, (SIDE, SIDE), interpolation=interpolation), np.uint8)

    def _faded(self, last: Picture, away: int) -> Picture:
        """The last face, faded for a face that has been missing for `away` frames."""
        if self.compat is not None:
            return np.zeros_like(last)
        light = min(max(1 - (away - self.hold) / (self.fade + 1), 0.0), 1.0)
        return np.asarray(np.rint(last * np.float32(light)), np.uint8)


def smoothed(boxes: Boxes, radius: int) -> Boxes:
    """Averages each box with the middles of pairs: one box before it, one equally long after it. Has no lag.

    For a face in even motion, at any speed, every such middle is at the face. A pair with its middle
    elsewhere (a jump, a turn) has no weight: `ALIKE` is twice the distance from a jitter of 2 % of the face.
    A filter that only looks back, such as One-Euro, must trade lag for jitter.
    """
    size = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    total, weights = boxes.copy(), np.ones(len(boxes))
    for step in range(1, min(radius, (len(boxes) - 1) // 2) + 1):
        here = slice(step, -step)
        middle = (boxes[: -2 * step] + boxes[2 * step :]) / 2
        distance = np.linalg.norm(middle - boxes[here], axis=1) / size[here]
        weight = 2 * np.exp(-((distance / ALIKE) ** 2) / 2)
        weight = np.where(np.isnan(weight), 0.0, weight)  # no face on either side
        total[here] += weight[:, None] * np.where(weight[:, None] > 0, middle, 0.0)
        weights[here] += weight
    return np.asarray(total / weights[:, None], np.float64)


def _box(skeleton: Skeleton, compat: Compat) -> NDArray[np.float64]:
    """The box [4] before it is cut to the picture. NaN: no box."""
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
