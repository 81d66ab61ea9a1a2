"""Arithmetic of limbs for retargeting: their lengths, and bodies rebuilt with other lengths.

Bodies are [n, 20, 2] (one body: [20, 2]) in pixels of their picture. `known` [n, 20] is true for joints that
are trusted. Lengths and ratios are [19] in the order of skeleton.LIMBS, NaN if unknown.
"""

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import InputError
from trt_wan.preprocess.people.skeleton import LIMBS, Points, Skeleton

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

SHOULDERS, TRUNK, NECK_LIMB = (0, 1), (0, 1, 6, 9), 12
SAME_LENGTH = ((0, 1), (2, 4), (3, 5), (6, 9), (7, 10), (8, 11), (17, 18))  # left and right of one body
EYES, EARS = (13, 15), (14, 16)
FEET = ((17, 11), (18, 8))  # a foot and the calf above it
FOOT_LIMIT = 0.5  # times the calf's length

KNOWN = 0.3  # least score of a trusted joint


def grown(bodies: Floats, known: Mask, ratios: Floats, limit_feet: bool = False) -> Floats:
    """Bodies [n, 20, 2] with every limb's length times its ratio, directions kept, necks in place.

    A joint with an unknown parent hangs on its nearest known ancestor. Without one it stays in place.
    """
    held_old = np.where(known[..., None], bodies, 0.0)  # each joint, or its known ancestor
    held_new = held_old.copy()
    new = bodies.copy()
    factors = np.repeat(ratios[None], len(bodies), axis=0)
    if limit_feet:
        lengths = (
            np.stack([limb_lengths(body, sure) for body, sure in zip(bodies, known, strict=True)]) * ratios
        )
        for foot, calf in FEET:
            with np.errstate(invalid="ignore", divide="ignore"):
                limit = np.fmin(1.0, FOOT_LIMIT * lengths[:, calf] / lengths[:, foot])
            factors[:, foot] *= limit
    for limb, (parent, child) in enumerate(LIMBS):
        factor = np.where(known[:, parent], factors[:, limb], 1.0)[:, None]
        new[:, child] = held_new[:, parent] + (bodies[:, child] - held_old[:, parent]) * factor
        sure = known[:, child, None]
        held_old[:, child] = np.where(sure, bodies[:, child], held_old[:, parent])
        held_new[:, child] = np.where(sure, new[:, child], held_new[:, parent])
    return new


def evened(ratios: Floats) -> Floats:
    """Left and right get the larger ratio, because a limb that points at the camera looks short. Eyes and
    ears get the mean, because a head is often turned.
    """
    ratios = ratios.copy()
    for pair in SAME_LENGTH:
        ratios[list(pair)] = np.fmax(*ratios[list(pair)])
    for pair in (EYES, EARS):
        one, other = ratios[list(pair)]
        ratios[list(pair)] = (
            np.fmin(one, other) / 2 + np.fmax(one, other) / 2
        )  # a single known one counts alone
    return ratios


def limb_lengths(body: Floats, known: Mask) -> Floats:
    """[19], NaN for a limb with an unknown end or without length."""
    parents, children = np.array(LIMBS).T
    lengths = np.linalg.norm(body[children] - body[parents], axis=1)
    return np.where(known[children] & known[parents] & (lengths > 0), lengths, np.nan)


def believed(points: Points) -> Mask:
    return np.asarray(points[:, 2] >= KNOWN)


def body_xy(skeleton: Skeleton) -> Floats:
    return skeleton.body[:, :2].astype(np.float64)


def middle(body: Floats, one: int, other: int) -> Floats:
    return np.asarray((body[one] + body[other]) / 2, np.float64)


def rebuilt(reference: Skeleton, driving: Skeleton, body: Floats, left: Floats, right: Floats) -> Skeleton:
    """A skeleton with the driving scores. A joint at NaN is unknown."""
    points = np.concatenate([body, driving.body[:, 2:]], axis=1)
    with np.errstate(over="ignore"):  # Skeleton drops too large numbers
        body32, left32, right32 = (part.astype(np.float32) for part in (points, left, right))
    return Skeleton(body32, left32, right32, np.zeros_like(driving.face), reference.width, reference.height)


def no_shoulders(where: str) -> InputError:
    return InputError(
        f"{where} does not show both shoulders, so body proportions cannot be compared.",
        "Use a picture of the person from the front, or --retarget off.",
    )
