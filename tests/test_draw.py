"""The pose picture: the official drawing pixel by pixel, options, and points no pose network should give.

golden/skeleton_720p.png is our drawing of the golden points; its bytes have the SHA-256 of the official one.
"""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_person import GOLDEN, HEIGHT, PERSON, WIDTH, person, skeleton, wild_points

from trt_wan.preprocess.people.skeleton import HEAD, LIMBS, Skeleton, from_keypoints, nobody
from trt_wan.preprocess.pictures.draw import draw_skeleton
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Picture

# Releases of OpenCV may fill the outline of an ellipse or a circle differently; 4.14 (golden) and 5.0 do not
# differ in one pixel. Of the drawing's 8030 pixels 1 % may differ: a stick one pixel wider is over 20 %, one
# limb or one limb's colour about 5 %.
PIXELS = 80


def drawn(skeleton: Skeleton, **options: bool) -> Picture:
    return draw_skeleton(skeleton, skeleton.width, skeleton.height, **options)


def different(one: Picture, other: Picture) -> int:
    return int((one != other).any(axis=-1).sum())


def only(*joints: int) -> Skeleton:
    """The golden body with these joints alone."""
    full = skeleton(PERSON)
    body = full.body.copy()
    body[[i for i in range(20) if i not in joints], 2] = 0
    none = np.zeros((21, 3), np.float32)
    return Skeleton(body, none, none, full.face, full.width, full.height)


def test_body_joints_golden() -> None:
    body = skeleton(PERSON).body
    np.testing.assert_allclose(body / (WIDTH, HEIGHT, 1), GOLDEN["body20"], atol=1e-6)


def test_drawing_golden() -> None:
    golden = read_picture(Path(__file__).parent / "golden" / "skeleton_720p.png")
    expected = GOLDEN["draw_720p"]
    assert hashlib.sha256(golden.tobytes()).hexdigest() == expected["sha256"]
    picture = drawn(skeleton(PERSON))
    assert different(picture, golden) <= PIXELS
    assert abs(int(picture.any(axis=-1).sum()) - expected["nonzero"]) <= PIXELS
    # The tolerance is small enough to find what it should.
    assert different(drawn(skeleton(PERSON), hands=False), golden) > PIXELS
    assert different(drawn(skeleton(PERSON + np.float32([0.0, 1.0, 0.0]))), golden) > PIXELS


@pytest.mark.parametrize("size, stick", [((832, 480), 1), ((1280, 720), 2), ((1920, 1080), 4), ((64, 64), 1)])
def test_sticks_grow_with_the_picture(size: tuple[int, int], stick: int) -> None:
    points = np.zeros((133, 3), np.float32)
    points[0] = size[0] // 2, size[1] // 2, 1  # the nose alone
    picture = drawn(from_keypoints(points, *size))
    rows = picture.any(axis=(1, 2))
    assert rows.sum() == 2 * stick + 1
    assert tuple(picture[size[1] // 2, size[0] // 2]) == (255, 0, 0)


@pytest.mark.parametrize("limb", range(len(LIMBS)))
def test_each_limb_lies_between_its_joints(limb: int) -> None:
    ends = only(*LIMBS[limb])
    picture = drawn(ends)
    one, other = (ends.body[joint, :2] for joint in LIMBS[limb])
    for t in (0.25, 0.5, 0.75):
        x, y = (one + (other - one) * t).astype(int)
        assert picture[y - 2 : y + 3, x - 2 : x + 3].any()
    ys, xs = np.nonzero(picture.any(axis=-1))
    low, high = np.minimum(one, other) - 4, np.maximum(one, other) + 4
    assert (np.stack([xs, ys], 1) >= low).all() and (np.stack([xs, ys], 1) <= high).all()
    # Darkened limb colour and two joint colours, no others.
    assert len({tuple(pixel) for pixel in picture[ys, xs].tolist()}) <= 3


def test_options_and_threshold() -> None:
    full = skeleton(person(score=0.9))
    no_hands, no_head = drawn(full, hands=False), drawn(full, head=False)
    assert different(no_hands, drawn(full)) > 100 and different(no_head, drawn(full)) > 100
    head = full.body[list(HEAD), :2]
    for x, y in head.astype(int):
        assert not no_head[y - 2 : y + 3, x - 2 : x + 3].any()
    np.testing.assert_array_equal(drawn(skeleton(person(score=0.5))), drawn(full))
    assert not drawn(skeleton(person(score=0.499))).any()
    assert not drawn(nobody(WIDTH, HEIGHT)).any()


def test_a_joint_is_not_made_from_a_point_that_is_not_known() -> None:
    points = person(score=1.0)
    points[5] = 0  # the left shoulder; the neck is the middle of both
    body = skeleton(points).body
    assert body[1, 2] == 0 and body[5, 2] == 0 and body[2, 2] == 1


def test_parts_outside_are_cut_off() -> None:
    inside = drawn(skeleton(person(x=-600)))
    wide = draw_skeleton(skeleton(person()), WIDTH, HEIGHT)
    # The visible part is the same picture, moved, but for hand points at the edge, which are left out.
    body = [s.body for s in (skeleton(person(x=-600)), skeleton(person()))]
    np.testing.assert_allclose(body[0][:, 0] + 600, body[1][:, 0], atol=1e-3)
    assert different(inside[:, 2 : WIDTH - 600], wide[:, 602:]) < 60


def test_hands_are_not_drawn_at_the_edge_and_bodies_are() -> None:
    outside = np.zeros((21, 3), np.float32)
    outside[:2] = [(-4, 300, 1), (60, 300, 1)]  # a thumb's root left of the picture
    none = np.zeros_like(outside)
    full = skeleton(PERSON)
    empty = np.zeros_like(full.body)
    hand = drawn(Skeleton(empty, outside, none, full.face, WIDTH, HEIGHT))
    assert hand[300, 60].any() and not hand[:, :50].any()
    arm = empty.copy()
    arm[[3, 4]] = outside[:2]
    assert drawn(Skeleton(arm, none, none, full.face, WIDTH, HEIGHT))[300, 5].any()


def test_any_points_on_any_picture() -> None:
    random = np.random.default_rng(1)
    for size in [(1, 1), (2, 1), (1, 500), (16, 16), (640, 480)] * 20:
        made = from_keypoints(wild_points(random), *size)
        assert all(np.isfinite(p).all() for p in (made.body, made.left_hand, made.right_hand, made.face))
        assert drawn(made).shape == (size[1], size[0], 3)
    wild = wild_points(random)
    raw = Skeleton(wild[:20], wild[91:112], wild[112:], wild[22:91], 64, 64)  # as an edited file may have it
    assert drawn(raw).shape == (64, 64, 3)


def test_8k() -> None:
    points = person(6.0)
    picture = draw_skeleton(from_keypoints(points, 7680, 4320), 7680, 4320)
    small = cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    both = (small.max(axis=-1) > 100) & (drawn(skeleton(person())).max(axis=-1) > 100)
    assert both.sum() > 2000  # the same figure, with sticks that have grown with the picture
