"""Prompts for SAM2 from the skeletons of a clip: key frames, and points of the person on them.

    official   eight joints every few dozen frames, with any score and at any place
    safe       at most four key frames that show enough joints, and their joints seen inside the frame

A skeleton here is its body: [20, 3], x and y in pixels, score (preprocess_spec.md A1.3, A1.6, A3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import InputError

Body = NDArray[np.float32]
Mask = NDArray[np.bool_]
PromptRule = Literal["official", "safe"]

JOINTS = (0, 1, 2, 5, 8, 11, 10, 13)  # nose, neck, shoulders, hips, ankles
CHUNK = 400  # frames. The official code restarts after each chunk
KEY_FRAMES = 4
MIN_SCORE = 0.3
MIN_JOINTS = 4
DISAGREEMENT = 0.5  # part of the points outside the mask that means a lost person
LIMB_SAMPLES = 5  # points along each limb where the mask is tested


@dataclass(frozen=True)
class KeyPrompt:
    """Points on the person in one frame."""

    frame: int
    points: NDArray[np.float32]  # [n, 2]

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.ones(len(self.points), np.int64)


def key_prompts(
    bodies: Sequence[Body], width: int, height: int, rule: PromptRule = "safe", chunk: int | None = None
) -> list[KeyPrompt]:
    """The prompts of a clip. With `chunk`, each chunk has separate key frames, as tracking by chunks needs.
    The official rule uses chunks of 400. Raises InputError if no frame shows enough of the person.
    """
    if rule == "official":
        chunk = chunk or CHUNK
        return [
            KeyPrompt(frame, official_points(bodies[frame]))
            for start in range(0, len(bodies), chunk)
            for frame in official_key_frames(start, min(chunk, len(bodies) - start))
        ]
    length = chunk or max(1, len(bodies))
    found = [
        KeyPrompt(frame, safe_points(bodies[frame], width, height))
        for start in range(0, len(bodies), length)
        for frame in safe_key_frames(bodies, start, min(length, len(bodies) - start), width, height)
    ]
    if not found:
        raise InputError(
            f"No frame shows {MIN_JOINTS} joints of the person clearly, so nothing can be segmented.",
            "Choose the person by hand, or use a clip in which they can be seen.",
        )
    return found


def official_key_frames(start: int, count: int) -> list[int]:
    """Every (count // 4)th of the `count` frames from `start`, which gives five or more if 4 does not divide
    the count. The first alone for four or fewer.
    """
    return list(range(start, start + count, count // KEY_FRAMES if count > KEY_FRAMES else count))


def official_points(body: Body) -> NDArray[np.float32]:
    """Whole pixels, rounded towards zero."""
    return body[list(JOINTS), :2].astype(np.int32).astype(np.float32)


def safe_key_frames(bodies: Sequence[Body], start: int, count: int, width: int, height: int) -> list[int]:
    """The frame with most joints from each quarter that shows enough, and always the first frame that shows
    enough, so that tracking begins as early as possible.
    """
    counts = np.array([len(safe_points(bodies[start + i], width, height)) for i in range(count)])
    usable = np.flatnonzero(counts >= MIN_JOINTS)
    if not len(usable):
        return []
    chosen = {int(usable[0])}
    edges = np.linspace(usable[0], count, KEY_FRAMES + 1).astype(int)
    for low, high in zip(edges[1:-1], edges[2:], strict=True):
        part = counts[low:high]
        if len(part) and part.max() >= MIN_JOINTS:
            chosen.add(int(low + part.argmax()))
    return sorted(start + frame for frame in chosen)


def safe_points(body: Body, width: int, height: int) -> NDArray[np.float32]:
    """The prompt joints seen inside the frame."""
    joints = body[list(JOINTS)]
    return joints[seen(joints, width, height), :2].astype(np.float32)


def seen(joints: Body, width: int, height: int) -> Mask:
    with np.errstate(invalid="ignore"):
        inside = (joints[:, 0] >= 0) & (joints[:, 0] < width) & (joints[:, 1] >= 0) & (joints[:, 1] < height)
        found: Mask = np.isfinite(joints).all(axis=1) & inside & (joints[:, 2] >= MIN_SCORE)
    return found


def disagreement(mask: Mask, body: Body) -> float | None:
    """The part of the joints and torso points outside the mask: 0 if mask and pose agree, 1 if they have
    nothing in common. None if too few joints are seen.

    Points have a tolerance of 1 % of the picture's height, because ankles and nose lie at edges.
    """
    height, width = mask.shape
    joints = body[list(JOINTS)]
    usable = seen(joints, width, height)
    if usable.sum() < MIN_JOINTS:
        return None
    points = [*joints[usable, :2], *_between(joints, usable)]
    reach = max(1, round(height / 100))
    missed = sum(not _touches(mask, point, reach) for point in points)
    return missed / len(points)


def wants_prompt(mask: Mask, body: Body) -> bool:
    """Whether the tracked mask has lost the person so clearly that it should be prompted again."""
    share = disagreement(mask, body)
    return share is not None and share > DISAGREEMENT


def _between(joints: Body, usable: Mask) -> list[NDArray[np.float32]]:
    """Points along the lines from shoulders to hips with both ends seen: these lie inside the body."""
    _, _, right_shoulder, left_shoulder, right_hip, left_hip, *_ = range(len(JOINTS))
    shoulders, hips = (right_shoulder, left_shoulder), (right_hip, left_hip)
    limbs = tuple((shoulder, hip) for shoulder in shoulders for hip in hips)
    steps = np.linspace(0, 1, LIMB_SAMPLES + 2)[1:-1, None]
    points: list[NDArray[np.float32]] = []
    for a, b in limbs:
        if usable[a] and usable[b]:
            points += list((joints[a, :2] * (1 - steps) + joints[b, :2] * steps).astype(np.float32))
    return points


def _touches(mask: Mask, point: NDArray[np.float32], reach: int) -> bool:
    x, y = int(point[0]), int(point[1])
    return bool(mask[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].any())
