"""Face crops: the official box, the gate, smoothing without lag, a face that goes away, input of any kind."""

import cv2
import numpy as np
import pytest
from made_person import GOLDEN, HEIGHT, PERSON, WIDTH, person, skeleton, wild_points

from trt_wan.preprocess.people.skeleton import Skeleton, from_keypoints, nobody
from trt_wan.preprocess.pictures.face import Compat, FaceCropper, face_box, smoothed
from trt_wan.runtime.video.reader import Picture

AWAY = nobody(WIDTH, HEIGHT)


def frames(count: int) -> list[Picture]:
    return [np.full((HEIGHT, WIDTH, 3), 40 + 10 * i, np.uint8) for i in range(count)]


def crops(cropper: FaceCropper, frames: list[Picture], skeletons: list[Skeleton]) -> list[Picture]:
    return list(cropper.crops(cropper.cuts(frames, skeletons)))


def centres(skeletons: list[Skeleton], cropper: FaceCropper) -> list[float]:
    boxes = cropper.boxes(skeletons)
    return [(box[0] + box[2]) / 2 for box in boxes if box is not None]


@pytest.mark.parametrize("compat", [None, "official", "kijai"])
def test_box_golden(compat: Compat) -> None:
    x0, x1, y0, y1 = GOLDEN["face_x1x2y1y2"]
    assert face_box(skeleton(PERSON), compat) == (x0, y0, x1, y1)


def test_a_face_must_be_seen() -> None:
    assert face_box(AWAY) is None
    assert face_box(AWAY, "official") is None
    assert face_box(skeleton(person(score=0.2))) is None
    assert face_box(skeleton(person(score=0.2)), "official") is not None
    stray = PERSON.copy()
    stray[40] = 5, 5, 0.1  # one point that the network guessed in a corner
    assert face_box(skeleton(stray)) == face_box(skeleton(PERSON))
    assert face_box(skeleton(stray), "official") != face_box(skeleton(PERSON))
    few = PERSON.copy()
    few[23 + 10 : 91, 2] = 0.1  # ten points left
    assert face_box(skeleton(few)) is None
    assert face_box(skeleton(person(0.05))) is None  # 4 pixels of a face


def test_boxes_are_cut_to_the_picture() -> None:
    assert face_box(skeleton(person(x=-640))) == (0, 83, 62, 208)
    assert face_box(skeleton(person(x=-5000))) is None
    assert face_box(skeleton(person(x=-5000)), "official") is None
    side = int(HEIGHT * 0.3)
    top = int(HEIGHT * 0.1)
    middle = ((WIDTH - side) // 2, top, (WIDTH - side) // 2 + side, top + side)
    assert face_box(skeleton(person(x=-5000)), "kijai") == middle


def test_padding() -> None:
    assert FaceCropper(padding=10).boxes([skeleton(PERSON)]) == [(592, 73, 712, 218)]
    assert FaceCropper(padding=100).boxes([skeleton(person(x=-640))]) == [(0, 0, 162, 308)]


def test_smoothing_calms_jitter() -> None:
    random = np.random.default_rng(0)
    size = 110  # px of the made-up face
    for speed in (0, 3, 30):  # px per frame: at rest, walking, whipping past
        xs = speed * np.arange(30) - 400 + random.normal(0, 0.02 * size, 30)
        moving = [skeleton(person(x=x), 2 * WIDTH) for x in xs]
        even = 652 - 400 + speed * np.arange(30)
        raw = np.array(centres(moving, FaceCropper(smoothing=0))) - even
        calm = np.array(centres(moving, FaceCropper())) - even
        inner = slice(4, -4)  # towards the ends there are fewer frames to average
        assert calm[inner].std() < 0.5 * raw[inner].std()
        assert abs(calm[inner].mean() - raw[inner].mean()) < 0.01 * size


def test_smoothing_has_no_lag_on_a_jump_and_on_fast_motion() -> None:
    jump = [skeleton(person(x=0 if i < 10 else 110)) for i in range(20)]  # by one face
    raw, calm = (np.array(centres(jump, FaceCropper(smoothing=n))) for n in (0, 4))
    assert np.abs(calm - raw).max() <= 1  # px: not a frame late, not a frame early
    # A nod as fast as a face's length in 4 frames, there and back.
    swing = [skeleton(person(x=80 * float(np.sin(2 * np.pi * i / 8)))) for i in range(40)]
    raw, calm = (np.array(centres(swing, FaceCropper(smoothing=n))) for n in (0, 4))
    steps = range(-3, 4)
    match = [float((np.roll(raw, step) * 1.0 - raw.mean()) @ (calm - calm.mean())) for step in steps]
    assert steps[int(np.argmax(match))] == 0
    assert (
        np.abs(calm - raw).max() < 0.1 * 110
    )  # and the face stays inside its box: 7 % are to spare on a side
    ramp = [skeleton(person(x=-400 + 25 * i)) for i in range(20)]
    raw, calm = (np.array(centres(ramp, FaceCropper(smoothing=n))) for n in (0, 4))
    assert np.abs(calm - raw).max() <= 1


def test_smoothing_leaves_gaps_alone() -> None:
    boxes = np.full((9, 4), np.nan)
    boxes[[0, 1, 2, 6, 7, 8]] = (100, 100, 200, 200)
    result = smoothed(boxes, 4)
    assert np.isnan(result[3:6]).all()
    np.testing.assert_allclose(result[[0, 1, 2, 6, 7, 8]], boxes[[0, 1, 2, 6, 7, 8]])


def test_crops_show_the_box() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for compat in (None, "official"):
        (crop,) = crops(FaceCropper(compat=compat), [picture], [skeleton(PERSON)])  # type: ignore[arg-type]
        expected = cv2.resize(picture[83:208, 602:702], (512, 512))
        np.testing.assert_array_equal(crop, expected)
    large = cv2.GaussianBlur(picture, (0, 0), 3)
    near = skeleton(person(8.0, -4800, -800))
    (box,) = FaceCropper().boxes([near])
    assert box is not None
    (crop,) = crops(FaceCropper(), [large], [near])
    x0, y0, x1, y1 = box
    np.testing.assert_array_equal(
        crop, cv2.resize(large[y0:y1, x0:x1], (512, 512), interpolation=cv2.INTER_AREA)
    )


def test_black_until_there_is_a_face_then_held_then_faded_then_back() -> None:
    here = skeleton(PERSON)
    people = [AWAY, AWAY, here, *[AWAY] * 7, here]
    faded = crops(FaceCropper(hold=2, fade=3), frames(11), people)
    assert all(crop.shape == (512, 512, 3) and crop.dtype == np.uint8 for crop in faded)
    levels = [int(crop.max()) for crop in faded]
    face = 40 + 10 * 2
    assert levels == [0, 0, face, face, face, 45, 30, 15, 0, 0, 40 + 10 * 10]
    official = [int(c.max()) for c in crops(FaceCropper(compat="official"), frames(11), people)]
    assert official == [0, 0, face, *[0] * 7, 140]


def test_never_a_face() -> None:
    black = crops(FaceCropper(), frames(3), [AWAY] * 3)
    assert len(black) == 3 and not any(crop.any() for crop in black)
    assert FaceCropper().boxes([]) == []


@pytest.mark.parametrize("compat", [None, "official", "kijai"])
def test_any_points_on_any_picture(compat: Compat) -> None:
    random = np.random.default_rng(2)
    sizes = [(1, 1), (2, 3), (500, 1), (64, 48)]
    for size in sizes:
        people = [from_keypoints(wild_points(random), *size) for _ in range(12)]
        wild = wild_points(random)
        people.append(Skeleton(wild[:20], wild[91:112], wild[112:], wild[22:91], *size))
        pictures = [random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in people]
        for padding in (0, 512):
            cropper = FaceCropper(padding=padding, compat=compat)
            for box in cropper.boxes(people):
                assert box is None or (0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1])
            assert all(crop.shape == (512, 512, 3) for crop in crops(cropper, pictures, people))
