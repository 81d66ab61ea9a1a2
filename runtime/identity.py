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

FACE_PROMPT = "image of a face"  # the official code's prompt for the picture
MOST_COORDINATE = 1 << 15  # px: larger than any picture
# The best similarity leaves this share of a template's spread (RMS about the centre) at most. A turned head
# of five points leaves 0.04 from the front, 0.17 at 30 degrees, 0.40 at 60 and 0.68 in profile; ArcFace's
# points in a wrong order leave 0.73 (corners of the mouth swapped) to 0.97 (right ones first).
MOST_RESIDUAL = 0.7
LEAST_BREADTH = 0.1  # how broad the points are, as a part of their length: 0.37 in profile, 0 on a line
# ArcFace's points in 112x112. Lynx's picture of 256x256 shows more: points are moved down by 10, shrunk to
# 0.8 about the centre, scaled by 2 and moved right by 16.
ARCFACE: Points = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
WIDER: Points = (((ARCFACE + (0, 10)) - 56) * 0.8 + 56) * 2 + (16, 0)
ARCFACE_SIDE = 112
ORDER = (
    "Give --identity-landmarks the left eye, the right eye, the tip of the nose and the corners of "
    "the mouth, left ones first as the picture shows them."
)
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
    if len(landmarks) != 10:
        raise UsageError(
            f"The identity has {len(landmarks)} numbers as landmarks, not x and y of five points.", ORDER
        )
    if wrong := [v for v in landmarks if not (math.isfinite(v) and abs(v) < MOST_COORDINATE)]:
        kind = "too large" if math.isfinite(wrong[0]) else "not finite"
        raise UsageError(f"The number {shown(wrong[0])} of the landmarks is {kind}.", ORDER)
    points = np.reshape(landmarks, (5, 2)).astype(np.float64)
    if np.ptp(points, axis=0).max() < 2:  # pixels
        raise UsageError("The five landmarks are all at one place.", "Give the points of one face.")
    longest, across = np.linalg.svd(points - points.mean(0), compute_uv=False)
    if across < LEAST_BREADTH * longest:
        raise UsageError("The five landmarks are on one line.", ORDER)
    if residual(points) > MOST_RESIDUAL:
        raise UsageError("The five landmarks are in another order than a face's, or of no face.", ORDER)


def require_inside(identity: FaceIdentity, picture: Picture) -> None:
    """Raises UsageError for a landmark outside `picture`, uint8 [height, width, 3]."""
    height, width, _ = picture.shape
    for x, y in identity.points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise UsageError(
                f"The landmark {x:g},{y:g} is outside {identity.picture}, which is {width}x{height}.",
                "Give --identity-landmarks in pixels of that picture, from its upper left corner.",
            )


def residual(points: Points) -> float:
    """The distance from ArcFace's points after the best similarity, as a share of those points' spread."""
    transform = similarity(points, ARCFACE)
    left = points @ transform[:, :2].T + transform[:, 2] - ARCFACE
    return float(np.linalg.norm(left) / np.linalg.norm(ARCFACE - ARCFACE.mean(0)))


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
