"""The identity of a face for a job: its picture, its landmarks, and how strongly Lynx's adapters act.

Five landmarks align the face: they are moved, turned and scaled onto fixed points, to 112x112 pixels for the
face embedder and to 256x256 for the ref adapter (addons_spec.md 2.2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import UsageError, shown
from trt_wan.runtime.executors import Array
from trt_wan.runtime.fields import check_fields
from trt_wan.runtime.guidance import MOST_STRENGTH, acting
from trt_wan.runtime.video.reader import Picture

Points = NDArray[np.float64]  # [5, 2] pixels: eyes, tip of the nose, corners of the mouth; left ones first

FACE_PROMPT = "image of a face"  # of the picture, in the official code
MOST_COORDINATE = 1 << 15  # px: larger than any picture
# ArcFace's points in 112x112. Lynx's picture of 256x256 shows more: points are moved down by 10, shrunk to
# 0.8 about the centre, scaled by 2 and moved right by 16.
ARCFACE: Points = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
WIDER: Points = (((ARCFACE + (0, 10)) - 56) * 0.8 + 56) * 2 + (16, 0)
ARCFACE_SIDE = 112
TEMPLATES = {ARCFACE_SIDE: ARCFACE, 256: WIDER}  # by the picture's side


@dataclass(frozen=True)
class FaceIdentity:
    """A face that the character is to have. `landmarks` are x, y of five points of the picture in pixels, as
    in `Points`. The IP adapter needs `embedder`, ArcFace IR-SE50 as ONNX. Percent are of the steps.
    """

    picture: Path
    landmarks: tuple[float, ...] = ()
    embedder: Path | None = None
    ip_scale: float = 1.0
    ref_scale: float = 1.0
    start: float = 0.0
    end: float = 100.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in (("ip", self.ip_scale), ("ref", self.ref_scale)):
            if not 0 <= value <= MOST_STRENGTH:
                raise UsageError(
                    f"An identity scale of {shown(value)} is not possible.",
                    f"Use --identity-{name}-scale 0 (off) to 1, or up to {MOST_STRENGTH} to exaggerate.",
                )
        if self.landmarks:
            require_landmarks(self.landmarks)

    @property
    def acts(self) -> bool:
        """Whether it changes anything: no weights are needed for one that does not."""
        return (self.ip_scale > 0 or self.ref_scale > 0) and self.end != 0

    def acting(self, steps: int) -> tuple[bool, ...]:
        """Whether it acts, for every step. Raises UsageError."""
        if not self.acts:
            return (False,) * steps
        return acting("identity", self.start, self.end, steps, "--identity-end 0")

    @property
    def points(self) -> Points:
        """Raises UsageError without landmarks."""
        require_landmarks(self.landmarks)
        return np.reshape(self.landmarks, (5, 2)).astype(np.float64)


def require_landmarks(landmarks: Sequence[float]) -> None:
    """Raises UsageError for landmarks that cannot be aligned."""
    if len(landmarks) != 10 or not all(math.isfinite(v) and abs(v) < MOST_COORDINATE for v in landmarks):
        raise UsageError(
            f"The identity has {len(landmarks)} numbers as landmarks, not x and y of five points.",
            "Give --identity-landmarks the left eye, the right eye, the tip of the nose and the corners of "
            "the mouth, left ones first as the picture shows them.",
        )
    points = np.reshape(landmarks, (5, 2))
    if np.ptp(points, axis=0).max() < 2:  # pixels
        raise UsageError("The five landmarks are all at one place.", "Give the points of one face.")


def similarity(points: Points, template: Points) -> NDArray[np.float64]:
    """The transform [2, 3] of rotation, scale and shift that brings `points` nearest to `template`."""
    x, y = points.T
    zeros, ones = np.zeros(5), np.ones(5)
    rows = np.concatenate((np.stack((x, -y, ones, zeros), 1), np.stack((y, x, zeros, ones), 1)))
    a, b, dx, dy = np.linalg.lstsq(rows, template.T.reshape(-1), rcond=None)[0]
    return np.array([[a, -b, dx], [b, a, dy]])


def aligned(picture: Picture, points: Points, side: int) -> Picture:
    """The face as uint8 RGB [side, side, 3]; black beyond the picture. `side` is one of TEMPLATES."""
    transform = similarity(points, TEMPLATES[side])
    warped = cv2.warpAffine(picture, transform, (side, side), flags=cv2.INTER_LINEAR)
    return np.asarray(warped, np.uint8)


def embedder_input(face: Picture) -> Array:
    """float32 BGR [1, 3, 112, 112] in [-1, 1] of `aligned` RGB pixels."""
    signal: Any = face[..., ::-1].astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(signal.transpose(2, 0, 1)[None])
