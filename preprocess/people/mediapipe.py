"""The fallback for users without ONNX files: MediaPipe's bundled models (Apache-2.0, extra `mediapipe`).

MediaPipe finds and tracks one person: body, face and hands, and the person's outline. Its 33 body joints, 468
face points and 21 points per hand become the 133 joints of person.py. Nothing is downloaded: the package
0.10.14 contains the models, which recent packages (1.2.2) do not.
"""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import EnvironmentBroken, with_commands
from trt_wan.install import install_command
from trt_wan.preprocess.people.person import (
    FACE,
    JOINTS,
    LEFT_HAND,
    NOBODY,
    RIGHT_HAND,
    Keypoints,
    PersonFrame,
    box_of_joints,
)
from trt_wan.runtime.video.reader import Picture

Mask = NDArray[np.bool_]

SURE = 0.5  # least value of the mask, and least score of a joint inside the box

# MediaPipe's body joint for each of the joints 0-22. Its one toe point stands for both toes.
BODY_POINTS = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28, 31, 31, 29, 32, 32, 30)

# The point of MediaPipe's face mesh for each of our 68 face points, in order (jaw, brows, nose, eyes, lips,
# each from the picture's left).
FACE_POINTS = (
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),
    *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301),
    *(168, 197, 5, 4, 75, 97, 2, 326, 305),
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87),
)


class MediapipePeople:
    """A context manager: MediaPipe's graph holds threads and memory until it is closed."""

    def __init__(self) -> None:
        self._mediapipe = _mediapipe()
        self.name = f"MediaPipe {self._mediapipe.__version__} (bundled models)"
        self._graph: Any = None

    def __enter__(self) -> "MediapipePeople":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._graph is not None:
            self._graph.close()

    def frames(self, pictures: Iterable[Picture]) -> Iterator[tuple[PersonFrame, Mask | None]]:
        """The person and the outline [H, W] in each frame, in order. The outline is None without a person."""
        for picture in pictures:
            height, width = picture.shape[:2]
            found = self._found(np.ascontiguousarray(picture))
            keypoints = keypoints_of(found, width, height)
            if keypoints is None:
                yield NOBODY, None
                continue
            mask = None if found.segmentation_mask is None else found.segmentation_mask > SURE
            yield PersonFrame(box_of_joints(keypoints, SURE), keypoints), mask

    def _found(self, picture: Picture) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="google.protobuf")
            if self._graph is not None:
                return self._graph.process(picture)
            with _silence():
                self._graph = self._mediapipe.solutions.holistic.Holistic(
                    model_complexity=1,  # 0 and 2 are not in the package
                    enable_segmentation=True,
                )
                return self._graph.process(picture)


def keypoints_of(found: Any, width: int, height: int) -> Keypoints | None:
    """The result of MediaPipe's "holistic" solution as keypoints in pixels. A body joint's score is its
    visibility. Face and hands have no visibility and score 1 if they are found.
    """
    if found.pose_landmarks is None:
        return None
    keypoints = np.zeros((JOINTS, 3), np.float32)
    body = found.pose_landmarks.landmark
    keypoints[: len(BODY_POINTS)] = [(body[i].x, body[i].y, body[i].visibility) for i in BODY_POINTS]
    for part, landmarks, points in (
        (FACE, found.face_landmarks, FACE_POINTS),
        (LEFT_HAND, found.left_hand_landmarks, range(21)),
        (RIGHT_HAND, found.right_hand_landmarks, range(21)),
    ):
        if landmarks is not None:
            keypoints[part] = _places(landmarks.landmark, points)
    keypoints[:, :2] *= (width, height)
    return keypoints


def _places(landmarks: Sequence[Any], points: Iterable[int]) -> list[tuple[float, float, float]]:
    return [(landmarks[i].x, landmarks[i].y, 1.0) for i in points]


@contextmanager
def _silence() -> Iterator[None]:
    """Hides the output of MediaPipe's C++ threads to stderr while its models load. None of its settings stops
    it (0.10.14).
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _mediapipe() -> ModuleType:
    try:
        import mediapipe
    except ImportError as error:
        raise EnvironmentBroken(f"MediaPipe cannot be used here ({error}).", _install()) from error
    if not hasattr(mediapipe, "solutions"):
        raise EnvironmentBroken(f"MediaPipe {mediapipe.__version__} no longer contains models.", _install())
    module: ModuleType = mediapipe
    return module


def _install() -> str:
    return with_commands(
        "Its last release with models needs Python 3.12 or older. Run:", install_command("mediapipe")
    )
