"""The followed person in one frame: a box and 133 joints.

Joints are COCO-WholeBody's: 0-16 body, 17-22 feet, 23-90 face, 91-111 left hand, 112-132 right hand.
Coordinates are pixels of the frame, x right, y down. Scores are 0 to about 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.video.reader import Picture

JOINTS = 133
BODY, FEET, FACE = slice(0, 17), slice(17, 23), slice(23, 91)
LEFT_HAND, RIGHT_HAND = slice(91, 112), slice(112, 133)

Keypoints = NDArray[np.float32]  # [133, 3]: x, y, score. An unknown joint has score 0


@dataclass(frozen=True)
class Box:
    x0: float
    y0: float
    x1: float
    y1: float
    score: float = 1.0

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        return self.width * self.height

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def contains(self, x: float, y: float) -> bool:
        return self.x0 <= x <= self.x1 and self.y0 <= y <= self.y1


@dataclass(frozen=True)
class PersonFrame:
    """None: the person is not in this frame."""

    box: Box | None
    keypoints: Keypoints | None


NOBODY = PersonFrame(None, None)
Follow = Callable[[Sequence[Picture]], list[PersonFrame]]  # the same person in the next frames


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0 for boxes without area."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (a.area + b.area - width * height)


def box_of_joints(keypoints: Keypoints, least_score: float) -> Box | None:
    """The box around joints of at least that score, with their mean score. None for fewer than two joints."""
    sure = keypoints[keypoints[:, 2] >= least_score]
    if len(sure) < 2:
        return None
    (x0, y0), (x1, y1) = sure[:, :2].min(0), sure[:, :2].max(0)
    return Box(float(x0), float(y0), float(x1), float(y1), float(sure[:, 2].mean()))
