"""A made-up person for tests of the preprocessing: the 133 points that the golden values were made with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.preprocess.people.skeleton import Skeleton, from_keypoints

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "preprocess.json").read_text())
WIDTH, HEIGHT = 1280, 720
PERSON: NDArray[np.float32] = np.array(
    GOLDEN["keypoints"], np.float32
)  # [133, 3], in pixels of WIDTH x HEIGHT


def person(scale: float = 1.0, x: float = 0.0, y: float = 0.0, score: float = 0.9) -> NDArray[np.float32]:
    """The 133 points `scale` times as large around the picture's corner, then moved; every score the same."""
    points = PERSON.copy()
    points[:, :2] = points[:, :2] * scale + (x, y)
    points[:, 2] = score
    return points


def skeleton(points: NDArray[np.float32], width: int = WIDTH, height: int = HEIGHT) -> Skeleton:
    return from_keypoints(points, width, height)


def wild_points(random: np.random.Generator) -> NDArray[np.float32]:
    """133 points as no pose network should give them: outside, enormous, NaN, infinite, any score."""
    points = random.normal(0, 10.0 ** random.uniform(0, 6), (133, 3)).astype(np.float32)
    points[:, 2] = random.uniform(-0.5, 1.5, 133)
    for value in (np.nan, np.inf, -np.inf, 1e38, 0.0):
        points[random.integers(0, 133, 8), random.integers(0, 3, 8)] = value
    return points
