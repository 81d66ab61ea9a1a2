"""Five landmarks of a face in a picture, from the 68 points that the pose network gives a face.

An eye is the mean of the six points around it. The tip of the nose and the corners of the mouth are points of
the 68 (30, 48, 54). Left is the left side of the picture. The face is that of the person whom the networks
follow in a picture: the largest.
"""

from pathlib import Path

import numpy as np

from trt_wan.errors import InputError
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.person import FACE, Keypoints
from trt_wan.preprocess.stages import PeopleSource
from trt_wan.runtime.events import silent
from trt_wan.runtime.video.pictures import read_picture

EYES, NOSE, MOUTH = (slice(36, 42), slice(42, 48)), 30, (48, 54)
SURE = 0.3  # least score of a point that counts


def face_landmarks(picture: Path, people: PeopleSource) -> tuple[float, ...]:
    """x, y of five points of the picture, in pixels. Raises InputError for a picture without a face."""
    (person,) = people.follow(iter([read_picture(picture)]), PersonChoice(), silent)
    points = None if person.keypoints is None else five_points(person.keypoints)
    if points is None:
        raise InputError(
            f"There is no face in {picture} that can be seen from the front.",
            "Name another picture, or the five points of the face with --identity-landmarks.",
        )
    return points


def five_points(keypoints: Keypoints) -> tuple[float, ...] | None:
    """None if one of the points is not seen."""
    face = keypoints[FACE].astype(np.float64)
    groups = [face[eye] for eye in EYES] + [face[k : k + 1] for k in (NOSE, *MOUTH)]
    if any(group[:, 2].min() < SURE for group in groups):
        return None
    return tuple(float(number) for group in groups for number in group[:, :2].mean(0))
