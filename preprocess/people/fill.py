"""Interpolates joints that are missing or doubtful for a few frames, and drops those missing for longer.

Nothing is added before the first or after the last sight of a joint.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trt_wan.preprocess.people.person import JOINTS, Box, PersonFrame

SURE = 0.5  # least score that is drawn, as in the official code
KNOWN = 0.3  # joints of a lower score are dropped


def fill_gaps(frames: Sequence[PersonFrame], max_gap: int) -> list[PersonFrame]:
    """Fills gaps of at most `max_gap` frames.

    A joint with a score below SURE is interpolated between the sure sights around it, and gets the lower of
    their scores. In longer gaps it stays as it is if its score reaches KNOWN, else its score becomes 0.
    Frames without the person get box and joints in the same way, and stay empty in longer gaps.
    """
    if not frames:
        return []
    joints = np.zeros((len(frames), JOINTS, 3), np.float32)
    for i, frame in enumerate(frames):
        if frame.keypoints is not None:
            joints[i] = frame.keypoints
    boxes = np.zeros((len(frames), 1, 5), np.float32)
    for i, frame in enumerate(frames):
        if frame.box is not None:
            b = frame.box
            boxes[i, 0] = b.x0, b.y0, b.x1, b.y1, b.score
    there = np.array([frame.keypoints is not None for frame in frames])
    boxed = np.array([frame.box is not None for frame in frames])
    sure = np.isfinite(joints).all(2) & (joints[..., 2] >= SURE)
    joints, filled = _interpolated(joints, sure, max_gap)
    joints[~(joints[..., 2] >= KNOWN)] = 0  # this form also drops NaN
    boxes, box_filled = _interpolated(boxes, boxed[:, None], max_gap)
    result = []
    for i in range(len(frames)):
        seen = there[i] or filled[i].any()
        box = Box(*map(float, boxes[i, 0])) if boxed[i] or (box_filled[i, 0] and seen) else None
        result.append(PersonFrame(box, joints[i] if seen else None))
    return result


def _interpolated(
    values: NDArray[np.float32], sure: NDArray[np.bool_], max_gap: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`values` [frames, things, coordinates and score] with short gaps filled, and the filled places as bool
    [frames, things].
    """
    values, filled = values.copy(), np.zeros(sure.shape, bool)
    for thing in range(sure.shape[1]):
        seen = np.flatnonzero(sure[:, thing])
        for before, after in zip(seen[:-1], seen[1:], strict=True):
            gap = after - before - 1
            if 0 < gap <= max_gap:
                part = (np.arange(1, gap + 1) / (gap + 1))[:, None].astype(np.float32)
                first, last = values[before, thing], values[after, thing]
                between = first * (1 - part) + last * part
                between[:, -1] = min(first[-1], last[-1])
                values[before + 1 : after, thing] = between
                filled[before + 1 : after, thing] = True
    return values, filled
