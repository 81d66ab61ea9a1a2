"""Retargeting by Wan2.2's rules, including its mistakes, for the same results.

Lengths come from the first driving frame alone: both people must face the camera there, with limbs stretched.
"""

from collections.abc import Sequence

import numpy as np

from trt_wan.errors import UsageError
from trt_wan.preprocess.people.skeleton import (
    HEAD,
    L_ANKLE,
    L_HIP,
    L_SHOULDER,
    L_TOE,
    L_WRIST,
    NECK,
    NOSE,
    R_ANKLE,
    R_HIP,
    R_SHOULDER,
    R_TOE,
    R_WRIST,
    Skeleton,
)
from trt_wan.preprocess.retarget.limbs import (
    SHOULDERS,
    Floats,
    Mask,
    body_xy,
    evened,
    grown,
    limb_lengths,
    middle,
    no_shoulders,
    rebuilt,
)


def retarget_official(
    reference: Skeleton,
    driving: Sequence[Skeleton],
    edited_reference: Skeleton | None,
    edited_driving: Skeleton | None,
) -> list[Skeleton]:
    """See rules.py."""
    first = driving[0]
    scale, _ = _height_ratio(first, reference)
    # The reference at the driving person's scale, with sides of whole pixels.
    target = _rescaled(reference, scale)
    if edited_reference is None and edited_driving is None:
        ratios = limb_lengths(target, _scored(reference)) / limb_lengths(body_xy(first), _scored(first))
    elif edited_reference is None or edited_driving is None:
        raise UsageError(
            "The official retargeting takes two edited pictures, of the reference and of the driving person.",
            "Give both or neither, or use --retarget safe, which takes either.",
        )
    else:
        edited_scale, by_canvas = _height_ratio(edited_driving, edited_reference)
        lengths = limb_lengths(_rescaled(edited_reference, edited_scale), _scored(edited_reference))
        ratios = lengths / limb_lengths(body_xy(edited_driving), _scored(edited_driving))
        if by_canvas:
            ratios = ratios * _zoom(reference, edited_reference) / _zoom(first, edited_driving)
    ratios = np.where(np.isfinite(ratios), ratios, np.nan)
    if np.isnan(ratios[list(SHOULDERS)]).any():
        raise no_shoulders("The reference picture or the first driving frame")
    ratios = evened(np.where(np.isnan(ratios), ratios[list(SHOULDERS)].mean(), ratios))

    everything = np.ones((len(driving), len(first.body)), bool)
    start = grown(body_xy(first)[None], everything[:1], ratios)[0]
    offset = start[NECK] - target[NECK]
    if _full_body(first) and _full_body(reference):
        feet = np.maximum(*((target[a] + target[t]) / 2 for a, t in ((L_ANKLE, L_TOE), (R_ANKLE, R_TOE))))
        ground = max(start[R_ANKLE, 1], start[L_ANKLE, 1]) - feet[1]
        offset = np.array([(middle(start, R_HIP, L_HIP) - middle(target, R_HIP, L_HIP))[0], ground])
    old = np.stack([body_xy(skeleton) for skeleton in driving])
    new = (grown(old, everything, ratios, limit_feet=True) - offset) / scale
    hand_ratio = float(ratios[list(SHOULDERS)].max()) / scale
    return [
        rebuilt(reference, skeleton, body, *_official_hands(skeleton, body, hand_ratio))
        for skeleton, body in zip(driving, new, strict=True)
    ]


def _height_ratio(driving: Skeleton, reference: Skeleton) -> tuple[float, bool]:
    """The driving person's size relative to the reference, and whether it is a guess from the pictures'
    sizes.
    """
    for low in ((R_ANKLE, L_ANKLE), (R_HIP, L_HIP)):
        seen = (NOSE, *low)
        if min(driving.body[list(seen), 2].min(), reference.body[list(seen), 2].min()) > 0.5:
            heights = [abs(middle(body_xy(s), *low)[1] - body_xy(s)[NOSE, 1]) for s in (driving, reference)]
            if min(heights) > 0:
                return float(heights[0] / heights[1]), False
    sizes = [np.sqrt(s.width * s.height) for s in (driving, reference)]
    return float(sizes[0] / sizes[1]), True


def _rescaled(skeleton: Skeleton, scale: float) -> Floats:
    width, height = int(skeleton.width * scale), int(skeleton.height * scale)
    return body_xy(skeleton) * (width / skeleton.width, height / skeleton.height)


def _zoom(original: Skeleton, edited: Skeleton) -> float:
    """The original person's size relative to the edited one. Heads are compared in parts of the picture's
    width.
    """
    heads = [np.ptp(body_xy(s)[list(HEAD), 0]) / s.width for s in (original, edited)]
    shoulders = [
        float(np.linalg.norm(body_xy(s)[L_SHOULDER] - body_xy(s)[R_SHOULDER])) for s in (original, edited)
    ]
    if min(heads[1], shoulders[1]) <= 0:
        raise no_shoulders("An edited picture")
    return float(max(heads[0] / heads[1], shoulders[0] / shoulders[1]))


def _full_body(skeleton: Skeleton) -> bool:
    legs = skeleton.body[[R_HIP, L_HIP, R_ANKLE, L_ANKLE]]
    return bool((legs[:, 1] <= skeleton.height).all() and (legs[:, 2] >= 0.4).all())


def _official_hands(skeleton: Skeleton, body: Floats, ratio: float) -> tuple[Floats, Floats]:
    """Left and right hand [21, 3]. The sides can be swapped, which does not change the drawing."""
    wrists = body_xy(skeleton)[[R_WRIST, L_WRIST]]
    hands, roots = [], []
    for hand in (skeleton.right_hand, skeleton.left_hand):
        points = hand.astype(np.float64)
        points[:, :2] = points[0, :2] + (points[:, :2] - points[0, :2]) * ratio
        points[points[:, 2] < 0.4] = 0
        hands.append(points)
        roots.append(points[0, :2] if points[0, 2] > 0 else None)
    moves = [
        new - (old if root is None else root)
        for new, old, root in zip(body[[R_WRIST, L_WRIST]], wrists, roots, strict=True)
    ]
    # Wan2.2 uses the place of the right hand twice and never that of the left.
    right_root = np.array([-skeleton.width, -skeleton.height]) if roots[0] is None else roots[0]
    if np.linalg.norm(wrists[0] - right_root) > np.linalg.norm(wrists[1] - right_root):
        hands.reverse()
    for points, move in zip(hands, moves, strict=True):
        points[:, :2] = np.trunc(points[:, :2] + move)
        points[points[:, 2] == 0] = 0
    return hands[0], hands[1]


def _scored(skeleton: Skeleton) -> Mask:
    return np.asarray(skeleton.body[:, 2] > 0)
