"""Retargeting: the official rules by golden values, the safe ones by what they promise.

Promises are checked on people made by hand, whose true proportions are known: a driving clip, and a reference
that is the same person, or one with other limbs, at another size and place.
"""

import numpy as np
import pytest
from made_person import GOLDEN, HEIGHT, PERSON, WIDTH, person, skeleton, wild_points
from numpy.typing import NDArray

from trt_wan.errors import InputError, UsageError
from trt_wan.preprocess.people.skeleton import (
    L_ANKLE,
    L_ELBOW,
    L_EYE,
    L_HIP,
    L_KNEE,
    L_SHOULDER,
    L_TOE,
    L_WRIST,
    LIMBS,
    NECK,
    NOSE,
    R_ANKLE,
    R_ELBOW,
    R_EYE,
    R_HIP,
    R_KNEE,
    R_SHOULDER,
    R_WRIST,
    Skeleton,
    from_keypoints,
    nobody,
)
from trt_wan.preprocess.pictures.draw import draw_skeleton
from trt_wan.preprocess.retarget.rules import RetargetRule, retarget

Points = NDArray[np.float32]
BOTH: tuple[RetargetRule, ...] = ("official", "safe")
LEFT_ARM = [7, *range(91, 112), 9]  # of the 133 points: elbow, hand, wrist


def waving(frames: int = 12, scale: float = 1.0, x: float = 0.0, y: float = 0.0) -> list[Points]:
    """The left forearm turns around the elbow, the body sways; every limb keeps its length."""
    clip = []
    for i in range(frames):
        points = person(scale, x + 8 * i * scale, y)
        angle = 0.15 * i
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        forearm = [9, *range(91, 112)]
        elbow = points[7, :2].copy()
        points[forearm, :2] = elbow + (points[forearm, :2] - elbow) @ turn.T
        clip.append(points)
    return clip


def length(one: Skeleton, limb: tuple[int, int]) -> float:
    return float(np.linalg.norm(one.body[limb[0], :2] - one.body[limb[1], :2]))


def lengthened(points: Points, joints: list[int], parent: int, factor: float) -> Points:
    """The points with these joints (a limb and all that hangs on it) moved away from the parent joint."""
    points = points.copy()
    points[joints, :2] += (points[joints[0], :2] - points[parent, :2]) * (factor - 1)
    return points


def test_official_golden() -> None:
    # GOLDEN["retarget_input"] says how the people are made.
    reference = PERSON.copy()
    reference[:, 0] = 640 + (reference[:, 0] - 640) * 0.8
    reference[:, 1] = 100 + (reference[:, 1] - 150) * 0.7
    driving = []
    for t in range(3):
        points = PERSON.copy()
        points[7:11, 1] -= 15 * t
        points[[9, *range(91, 112)], 0] += 4 * t
        driving.append(skeleton(points))
    result = retarget(skeleton(reference), driving, "official")
    assert len(result) == 3
    for one, golden in zip(result, GOLDEN["retarget"], strict=True):
        np.testing.assert_allclose(one.body[:, :2], golden["body"], atol=1e-3)  # golden has 3 decimals
        np.testing.assert_array_equal(one.left_hand[0, :2], golden["lhand0"])
        np.testing.assert_array_equal(one.right_hand[0, :2], golden["rhand0"])
        assert one.left_hand[:, 2].sum() == pytest.approx(golden["lp"], abs=1e-4)
        assert one.right_hand[:, 2].sum() == pytest.approx(golden["rp"], abs=1e-4)
        assert (one.width, one.height) == (WIDTH, HEIGHT)


def test_official_neck_rule_and_scale_without_legs() -> None:
    """Legs out of the picture: heights are compared from nose to hips, and necks are put in one place."""
    reference = person(1.4, -250, 60)
    driving = [person(1.2, -100 + 10 * i, 40) for i in range(3)]
    result = retarget(skeleton(reference), [skeleton(points) for points in driving], "official")
    neck = skeleton(reference).body[NECK]
    np.testing.assert_allclose(result[0].body[NECK], neck, atol=1.5)  # canvas sides are cut to whole pixels
    np.testing.assert_allclose(result[2].body[NECK, 0] - neck[0], 20 * 1.4 / 1.2, atol=1.5)


def test_official_edited_pictures_give_the_lengths() -> None:
    reference, driving = skeleton(person()), [skeleton(person())]
    edited = lengthened(lengthened(person(), LEFT_ARM, 5, 1.5), [8, 10, *range(112, 133)], 6, 1.5)
    with pytest.raises(UsageError):
        retarget(reference, driving, "official", edited_reference=skeleton(edited))
    (result,) = retarget(
        reference, driving, "official", edited_reference=skeleton(edited), edited_driving=skeleton(person())
    )
    assert length(result, (L_SHOULDER, L_ELBOW)) == pytest.approx(
        1.5 * length(reference, (L_SHOULDER, L_ELBOW))
    )
    assert length(result, (R_HIP, R_KNEE)) == pytest.approx(length(reference, (R_HIP, R_KNEE)), rel=1e-3)
    # Without hips or ankles an editor's zoom is measured on head and shoulders instead.
    upper = person()
    upper[[11, 12, 13, 14, 15, 16], 2] = 0.1
    zoomed = upper * np.float32([2, 2, 1])
    (result,) = retarget(
        skeleton(upper),
        [skeleton(upper)],
        "official",
        edited_reference=skeleton(zoomed),
        edited_driving=skeleton(upper),
    )
    np.testing.assert_allclose(result.body[:14, :2], skeleton(upper).body[:14, :2], atol=0.1)


def test_official_hands_that_are_at_the_other_wrist() -> None:
    swapped = person()
    swapped[91:112, :2], swapped[112:133, :2] = person()[112:133, :2], person()[91:112, :2]
    driving = skeleton(swapped)
    (result,) = retarget(skeleton(person()), [driving], "official")
    # The rule: each hand is moved by what the other one's root would need.
    right_root, left_root = driving.right_hand[0, :2], driving.left_hand[0, :2]
    wrists = result.body[[R_WRIST, L_WRIST], :2]
    np.testing.assert_allclose(result.left_hand[0, :2], left_root + wrists[0] - right_root, atol=1)
    np.testing.assert_allclose(result.right_hand[0, :2], right_root + wrists[1] - left_root, atol=1)


@pytest.mark.parametrize("rule", BOTH)
def test_the_same_person_comes_out_where_the_reference_stands(rule: RetargetRule) -> None:
    scale = 0.6
    reference = skeleton(person(scale, 300, 100))
    result = retarget(reference, [skeleton(points) for points in waving()], rule)
    # Ground and hips agree, so the first frame is the reference itself; later ones are its movement, scaled.
    for i, (one, points) in enumerate(zip(result, waving(scale=scale, x=300, y=100), strict=True)):
        # official: the reference's sides are cut to whole pixels; the ground is taken between ankle and toe
        tolerance = 0.02 if rule == "safe" else 8
        np.testing.assert_allclose(one.body[:18], skeleton(points).body[:18], atol=tolerance, err_msg=f"{i}")


def test_hands_stay_on_their_wrists_and_sides() -> None:
    reference = skeleton(person(0.6, 300, 100))
    for one, points in zip(
        retarget(reference, [skeleton(p) for p in waving()], "safe"),
        waving(scale=0.6, x=300, y=100),
        strict=True,
    ):
        expected = skeleton(points)
        np.testing.assert_allclose(one.left_hand, expected.left_hand, atol=0.02)
        np.testing.assert_allclose(one.right_hand, expected.right_hand, atol=0.02)


@pytest.mark.parametrize("rule", BOTH)
def test_limbs_get_the_references_length_and_keep_their_direction(rule: RetargetRule) -> None:
    reference = lengthened(lengthened(person(), LEFT_ARM, 5, 1.4), [8, 10, *range(112, 133)], 6, 1.4)
    driving = [skeleton(points) for points in waving()]
    for one, before in zip(retarget(skeleton(reference), driving, rule), driving, strict=True):
        for limb in LIMBS[:17]:
            factor = 1.4 if limb in ((L_SHOULDER, L_ELBOW), (R_SHOULDER, R_ELBOW)) else 1.0
            assert length(one, limb) == pytest.approx(factor * length(before, limb), rel=2e-3)
            new, old = (s.body[limb[1], :2] - s.body[limb[0], :2] for s in (one, before))
            assert float(new @ old) == pytest.approx(length(one, limb) * length(before, limb), rel=1e-4)


def test_safe_puts_the_feet_on_the_references_ground() -> None:
    long_legs = person(x=200, y=-60)
    long_legs[13:23, 1] += 60  # from the knees down
    reference, (result,) = skeleton(long_legs), retarget(skeleton(long_legs), [skeleton(person())], "safe")
    ankles, hips = [R_ANKLE, L_ANKLE], [R_HIP, L_HIP]
    assert result.body[ankles, 1].max() == pytest.approx(reference.body[ankles, 1].max(), abs=0.01)
    assert result.body[hips, 0].mean() == pytest.approx(reference.body[hips, 0].mean(), abs=0.01)
    # Without feet in the picture it is the neck that is put in place.
    cropped = long_legs.copy()
    cropped[13:23, 2] = 0
    (result,) = retarget(skeleton(cropped), [skeleton(person())], "safe")
    np.testing.assert_allclose(result.body[NECK], skeleton(cropped).body[NECK], atol=0.01)


@pytest.mark.parametrize("rule", BOTH)
def test_feet_are_no_longer_than_half_a_calf(rule: RetargetRule) -> None:
    driving = person()
    driving[17:19, :2] += (200, 0)  # the left toes, far away
    (result,) = retarget(skeleton(person()), [skeleton(driving)], rule)
    assert length(result, (L_ANKLE, L_TOE)) <= 0.501 * length(result, (L_KNEE, L_ANKLE))


def test_one_eye_speaks_for_both() -> None:
    wide = person()
    wide[[1, 2], :2] = wide[0, :2] + (wide[[1, 2], :2] - wide[0, :2]) * 1.6
    wide[1, 2] = 0  # the left eye is hidden in the reference
    (result,) = retarget(skeleton(wide), [skeleton(person())], "safe")
    for eye in (R_EYE, L_EYE):
        assert length(result, (NOSE, eye)) == pytest.approx(
            1.6 * length(skeleton(person()), (NOSE, eye)), rel=1e-3
        )


def test_hands_are_scaled_with_the_shoulders_and_put_on_the_wrists() -> None:
    off = person()
    off[91:112, :2] += (12, 5)  # a hand that the network found beside its wrist
    broad = person()
    for side, shift in ((5, 40), (6, -40)):  # shoulders 160 px apart, now 240, with all that hangs on them
        arm = LEFT_ARM if side == 5 else [8, 10, *range(112, 133)]
        broad[[side, *arm], 0] += shift
    (safe,) = retarget(skeleton(broad), [skeleton(off)], "safe")
    np.testing.assert_allclose(safe.left_hand[0, :2], safe.body[L_WRIST, :2], atol=0.01)
    spread = float(np.ptp(skeleton(off).left_hand[:, 0]))
    assert np.ptp(safe.left_hand[:, 0]) == pytest.approx(1.5 * spread, rel=1e-3)

    doubtful = off.copy()
    doubtful[125:133, 2] = 0.39
    (official,) = retarget(skeleton(person(0.5, 100, 100)), [skeleton(doubtful)], "official")
    np.testing.assert_allclose(
        official.right_hand[0, :2], official.body[L_WRIST, :2], atol=1
    )  # sides are swapped
    assert np.ptp(official.right_hand[:, 0]) == pytest.approx(0.5 * spread, abs=1)
    assert (official.left_hand[13:] == 0).all() and (official.left_hand[:13, 2] > 0).all()


def test_a_foreshortened_first_frame_does_not_stretch_the_arms() -> None:
    """Both arms point at the camera in frame 0: by the official rule all later arms are far too long."""
    clip = [person(x=4 * i) for i in range(20)]
    for i in range(3):
        for shoulder, arm in ((5, LEFT_ARM), (6, [8, 10, *range(112, 133)])):
            clip[i] = lengthened(clip[i], arm, shoulder, 0.2)
    driving = [skeleton(points) for points in clip]
    reference = skeleton(person())
    true = length(reference, (L_SHOULDER, L_ELBOW))
    safe, official = (retarget(reference, driving, rule)[10] for rule in ("safe", "official"))
    assert length(safe, (L_SHOULDER, L_ELBOW)) == pytest.approx(true, rel=0.02)
    assert length(official, (L_SHOULDER, L_ELBOW)) > 3 * true


def test_a_person_who_comes_nearer_grows_and_keeps_the_shape() -> None:
    clip = [person(1 + 0.05 * i, -32 * i, 0) for i in range(15)]
    reference = skeleton(person(0.5, 300, 200))
    result = retarget(reference, [skeleton(points) for points in clip], "safe")
    for i, one in enumerate(result):
        for limb in LIMBS[:17]:
            assert length(one, limb) == pytest.approx((1 + 0.05 * i) * length(reference, limb), rel=1e-3)


def test_ratios_have_limits_and_so_has_the_neck() -> None:
    """A reference whose forearm was found in the wrong place, and one that looks up."""
    wrong = lengthened(person(), [9, *range(91, 112)], 7, 9.0)
    (result,) = retarget(skeleton(wrong), [skeleton(person())], "safe")
    plain = skeleton(person())
    assert length(result, (L_ELBOW, L_WRIST)) == pytest.approx(
        2 * length(plain, (L_ELBOW, L_WRIST)), rel=1e-3
    )
    stretched = lengthened(person(), [0, 1, 2, 3, 4], 0, 1.0)
    stretched[:5, 1] -= 100  # the neck is 110 px long otherwise
    (result,) = retarget(skeleton(stretched), [skeleton(person())], "safe")
    assert length(result, (NECK, NOSE)) == pytest.approx(1.25 * length(plain, (NECK, NOSE)), rel=1e-3)


def test_a_joint_that_was_not_found_moves_no_others() -> None:
    reference = lengthened(lengthened(person(), LEFT_ARM, 5, 1.2), [8, 10, *range(112, 133)], 6, 1.2)
    clip = [person() for _ in range(6)]
    clip[3][7] = 0  # the left elbow
    clip[4][6] = 0  # the right shoulder, and so the neck
    result = retarget(skeleton(reference), [skeleton(points) for points in clip], "safe")
    whole = result[0].body
    assert result[3].body[L_ELBOW, 2] == 0 and (result[4].body[[R_SHOULDER, NECK], 2] == 0).all()
    others = [i for i in range(20) if i not in (L_ELBOW, L_WRIST)]
    np.testing.assert_allclose(result[3].body[others], whole[others], atol=0.01)
    # The wrist hangs on the shoulder at the scale of the body: where it was, but for the longer upper arm.
    upper = length(skeleton(person()), (L_SHOULDER, L_ELBOW))
    assert np.linalg.norm(result[3].body[L_WRIST, :2] - whole[L_WRIST, :2]) < 0.25 * upper
    seen = [i for i in range(20) if i not in (NECK, R_SHOULDER)]
    assert np.abs(result[4].body[seen, :2] - whole[seen, :2]).max() < 0.4 * upper


def test_frames_without_the_person_stay_empty() -> None:
    away = nobody(WIDTH, HEIGHT)
    driving = [away, away, *(skeleton(points) for points in waving(4)), away]
    reference = skeleton(person(0.6, 300, 100))
    result = retarget(reference, driving, "safe")
    assert [bool(draw_skeleton(one, WIDTH, HEIGHT).any()) for one in result] == [False] * 2 + [True] * 4 + [
        False
    ]
    np.testing.assert_allclose(result[2].body[:18], reference.body[:18], atol=0.02)  # starts in its place


def test_safe_takes_either_edited_picture_at_any_size() -> None:
    bent = lengthened(lengthened(person(), LEFT_ARM, 5, 0.4), [8, 10, *range(112, 133)], 6, 0.4)
    straight = skeleton(person(0.7, 30, 20))
    true = length(skeleton(person()), (L_SHOULDER, L_ELBOW))
    (plain,) = retarget(skeleton(bent), [skeleton(person())], "safe")
    assert length(plain, (L_SHOULDER, L_ELBOW)) < 0.6 * true
    (mended,) = retarget(skeleton(bent), [skeleton(person())], "safe", edited_reference=straight)
    assert length(mended, (L_SHOULDER, L_ELBOW)) == pytest.approx(true, rel=1e-3)
    (mended,) = retarget(skeleton(person()), [skeleton(bent)], "safe", edited_driving=straight)
    assert length(mended, (L_SHOULDER, L_ELBOW)) == pytest.approx(0.4 * true, rel=1e-3)  # bent stays bent


@pytest.mark.parametrize("rule", BOTH)
def test_missing_shoulders_are_named(rule: RetargetRule) -> None:
    hidden = person()
    hidden[[5, 6], 2] = 0
    with pytest.raises(InputError, match="[Rr]eference picture.*shoulders"):
        retarget(skeleton(hidden), [skeleton(person())], rule)
    with pytest.raises(InputError, match="driving.*shoulders"):
        retarget(skeleton(person()), [skeleton(hidden), nobody(WIDTH, HEIGHT)], rule)
    assert retarget(skeleton(person()), [], rule) == []


@pytest.mark.parametrize("rule", BOTH)
def test_any_points_give_finite_skeletons_or_one_sentence(rule: RetargetRule) -> None:
    random = np.random.default_rng(3)
    done = 0
    for i in range(60):
        size = ((1, 1), (640, 480), (7680, 4320))[i % 3]
        clip = [from_keypoints(wild_points(random), *size) for _ in range(4)]
        reference = skeleton(person()) if i % 2 else from_keypoints(wild_points(random), *size)
        wild = wild_points(random)
        clip.append(Skeleton(wild[:20], wild[91:112], wild[112:], wild[22:91], *size))
        try:
            result = retarget(reference, clip, rule)
        except InputError:
            continue
        done += 1
        for one in result:
            assert (one.width, one.height) == (reference.width, reference.height)
            assert np.isfinite(one.body).all()
            assert draw_skeleton(one, 64, 64).shape == (64, 64, 3)
    assert done > 5  # of 60: most have no shoulders to go by
