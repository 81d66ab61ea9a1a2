"""One person in one frame as the model sees it: 20 body joints, two hands, the face. Pixels and scores.

Made from the 133 points of COCO-WholeBody (0-16 body, 17-22 feet, 23-90 face, 91-111 left hand, 112-132 right
hand). A point is x, y, score. An unknown point has score 0. All numbers are finite and of usual size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]  # [n, 3]: x, y in pixels, score

NOSE, NECK, R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST = range(8)
R_HIP, R_KNEE, R_ANKLE, L_HIP, L_KNEE, L_ANKLE, R_EYE, L_EYE, R_EAR, L_EAR, L_TOE, R_TOE = range(8, 20)
HEAD = (NOSE, R_EYE, L_EYE, R_EAR, L_EAR)

# Parent and child, from the neck outwards: a limb comes after the limb that leads to it. Drawing and colours
# follow the same order.
LIMBS = (
    (NECK, R_SHOULDER), (NECK, L_SHOULDER), (R_SHOULDER, R_ELBOW), (R_ELBOW, R_WRIST),
    (L_SHOULDER, L_ELBOW), (L_ELBOW, L_WRIST), (NECK, R_HIP), (R_HIP, R_KNEE),
    (R_KNEE, R_ANKLE), (NECK, L_HIP), (L_HIP, L_KNEE), (L_KNEE, L_ANKLE),
    (NECK, NOSE), (NOSE, R_EYE), (R_EYE, R_EAR), (NOSE, L_EYE),
    (L_EYE, L_EAR), (L_ANKLE, L_TOE), (R_ANKLE, R_TOE),
)  # fmt: skip

FAR = 1 << 15  # px: larger than any picture. Larger numbers overflow OpenCV's drawing

# Each body joint is the mean of two of the 133 points, usually the same point twice.
_FIRST = (0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 17, 20)
_SECOND = (0, 6, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 18, 21)


@dataclass(frozen=True)
class Skeleton:
    body: Points  # [20, 3]
    left_hand: Points  # [21, 3], from the wrist to the tips
    right_hand: Points  # [21, 3]
    face: Points  # [69, 3]: first the right heel, as in the official code, then 68 points of the face
    width: int  # pixels, the picture's
    height: int

    def __post_init__(self) -> None:
        for name in ("body", "left_hand", "right_hand", "face"):
            object.__setattr__(self, name, _usable(getattr(self, name)))


def from_keypoints(keypoints: Points | None, width: int, height: int) -> Skeleton:
    """From [133, 3], or None for a frame without the person: then all points are unknown."""
    if keypoints is None:
        keypoints = np.zeros((133, 3), np.float32)
    assert keypoints.shape == (133, 3), f"keypoints are {keypoints.shape}"
    points = _usable(keypoints)
    first, second = points[list(_FIRST)], points[list(_SECOND)]
    # With score 0 a position is meaningless, and so is its mean with a good point.
    both = (first[:, 2] > 0) & (second[:, 2] > 0)
    body = np.where(both[:, None], first / 2 + second / 2, np.float32(0))
    return Skeleton(body, points[91:112], points[112:133], points[22:91], width, height)


def nobody(width: int, height: int) -> Skeleton:
    return from_keypoints(None, width, height)


def _usable(points: NDArray[np.floating[Any]]) -> Points:
    """The points as float32. Points with NaN or too large a number become unknown."""
    usable = (np.abs(points) < FAR).all(axis=1, keepdims=True)
    return np.where(usable, points, 0).astype(np.float32)
