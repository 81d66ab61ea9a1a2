"""Gives the driving person's movements to the body of the reference picture, joint by joint.

Each limb keeps its direction and gets the reference's length: the skeleton is rebuilt from the neck outwards.
Then the whole figure is scaled and moved to the place of the reference.

An edited picture shows the same person in a better posture (facing the camera, arms and legs stretched). Only
lengths are taken from it.
"""

from collections.abc import Sequence
from typing import Literal

from trt_wan.preprocess.people.skeleton import Skeleton
from trt_wan.preprocess.retarget.official import retarget_official
from trt_wan.preprocess.retarget.safe import retarget_safe

RetargetRule = Literal["official", "safe"]


def retarget(
    reference: Skeleton,
    driving: Sequence[Skeleton],
    rule: RetargetRule,
    *,
    edited_reference: Skeleton | None = None,
    edited_driving: Skeleton | None = None,
) -> list[Skeleton]:
    """The driving skeletons with the reference's proportions, in pixels of the reference picture.

    They have no faces: faces are not drawn, and face crops come from the driving frames. Raises InputError if
    a picture does not show enough of the person.
    """
    if not driving:
        return []
    rules = {"official": retarget_official, "safe": retarget_safe}
    return rules[rule](reference, driving, edited_reference, edited_driving)
