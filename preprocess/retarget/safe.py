"""Retargeting that does not depend on a single good frame.

A limb's length is its longest in the whole clip, ratios have limits, and a missing joint does not move other
joints. The figure starts with the size and at the place of the reference.
"""

from collections.abc import Sequence

import numpy as np

from trt_wan.preprocess.people.skeleton import (
    L_ANKLE,
    L_HIP,
    L_WRIST,
    LIMBS,
    NECK,
    R_ANKLE,
    R_HIP,
    R_WRIST,
    Skeleton,
)
from trt_wan.preprocess.retarget.limbs import (
    NECK_LIMB,
    SHOULDERS,
    TRUNK,
    Floats,
    Mask,
    believed,
    body_xy,
    evened,
    grown,
    limb_lengths,
    middle,
    no_shoulders,
    rebuilt,
)

STRETCHED = 90  # percentile of a limb's length over the clip: the longest are errors of the pose network
RATIO_LIMITS = (0.5, 2.0)  # one limb relative to the whole body: people do not differ by more
NECK_LIMIT = 1.25  # times the shoulders' ratio: a tilted head looks like a long neck
ENOUGH = 0.9  # part of the limbs that the best frame shows


def retarget_safe(
    reference: Skeleton,
    driving: Sequence[Skeleton],
    edited_reference: Skeleton | None,
    edited_driving: Skeleton | None,
) -> list[Skeleton]:
    """See rules.py."""
    old = np.stack([body_xy(skeleton) for skeleton in driving])
    known = np.stack([believed(skeleton.body) for skeleton in driving])
    target = _with_edited(limb_lengths(body_xy(reference), believed(reference.body)), edited_reference)
    if np.isnan(target[list(SHOULDERS)]).any():
        raise no_shoulders("The reference picture")
    source, anchor = _stretched(old, known)
    source = _with_edited(source, edited_driving)

    ratios = target / source
    scale = float(np.nanmedian(ratios))  # ratio of the whole bodies, reference to driving
    shape = evened(np.clip(ratios / scale, *RATIO_LIMITS))
    shape = np.where(np.isnan(shape), 1.0, shape)
    shape[NECK_LIMB] = min(shape[NECK_LIMB], NECK_LIMIT * shape[list(SHOULDERS)].mean())

    new = grown(old, known, shape, limit_feet=True)
    offset = _offset(reference, driving[anchor], new[anchor], scale)
    hand_ratio = scale * float(shape[list(SHOULDERS)].max())
    skeletons = []
    for skeleton, before, after, sure in zip(driving, old, (new - offset) * scale, known, strict=True):
        hands = []
        for hand, wrist in ((skeleton.left_hand, L_WRIST), (skeleton.right_hand, R_WRIST)):
            points, seen = hand.astype(np.float64), believed(hand)
            root = points[0, :2] if seen[0] else before[wrist]
            place = after[wrist] if sure[wrist] else (root - offset) * scale
            points[:, :2] = place + (points[:, :2] - root) * hand_ratio
            points[~seen | ~(seen[0] | sure[wrist])] = 0
            hands.append(points)
        skeletons.append(rebuilt(reference, skeleton, np.where(sure[:, None], after, np.nan), *hands))
    return skeletons


def _stretched(bodies: Floats, known: Mask) -> tuple[Floats, int]:
    """Limb lengths at full stretch, at the scale of one frame, and that frame: the first one that shows the
    person about as completely as the best. The person's distance changes, so lengths are compared relative to
    the person's size.
    """
    lengths = np.stack([limb_lengths(body, sure) for body, sure in zip(bodies, known, strict=True)])
    seen = ~np.isnan(lengths)
    usable = seen[:, list(SHOULDERS)].all(axis=1)
    if not usable.any():
        raise no_shoulders("No frame of the driving clip")
    shown = np.where(usable, seen.sum(axis=1), 0)
    anchor = int(np.argmax(shown >= ENOUGH * shown.max()))
    limbs = seen.any(axis=0)
    typical = np.full(len(LIMBS), np.nan)
    typical[limbs] = np.nanmedian(lengths[:, limbs], axis=0)
    frames = seen.any(axis=1)
    size = np.full(len(bodies), np.nan)
    size[frames] = np.nanmedian((lengths / typical)[frames], axis=1)
    longest = np.full(len(LIMBS), np.nan)
    longest[limbs] = np.nanpercentile((lengths / size[:, None])[:, limbs], STRETCHED, axis=0)
    return longest * size[anchor], anchor


def _with_edited(lengths: Floats, edited: Skeleton | None) -> Floats:
    """Lengths from the edited picture at the original's scale: the trunk is the same in every posture."""
    if edited is None:
        return lengths
    better = limb_lengths(body_xy(edited), believed(edited.body))
    zoom = (lengths / better)[list(TRUNK)]
    if np.isnan(zoom).all():
        raise no_shoulders("An edited picture")
    return np.where(np.isnan(better), lengths, better * np.nanmedian(zoom))


def _offset(reference: Skeleton, driving: Skeleton, grown: Floats, scale: float) -> Floats:
    """The offset to subtract from the driving figure before scaling, so that it stands at the reference."""
    target = body_xy(reference) / scale
    if all(_whole(skeleton) for skeleton in (reference, driving)):
        ankles = [R_ANKLE, L_ANKLE]
        ground = grown[ankles, 1].max() - target[ankles, 1].max()
        return np.array([(middle(grown, R_HIP, L_HIP) - middle(target, R_HIP, L_HIP))[0], ground])
    return np.asarray(grown[NECK] - target[NECK], np.float64)


def _whole(skeleton: Skeleton) -> bool:
    legs = skeleton.body[[R_HIP, L_HIP, R_ANKLE, L_ANKLE]]
    return bool((believed(legs) & (legs[:, 1] <= skeleton.height)).all())
