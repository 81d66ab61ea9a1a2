"""The pose picture: a person's skeleton on black, drawn as in the model's training.

Pixels, colours and order are exactly those of Wan2.2's preprocessing. Face points are not drawn: the model
gets the face as a separate clip.
"""

import colorsys
import math

import cv2
import numpy as np

from trt_wan.preprocess.people.skeleton import HEAD, LIMBS, Points, Skeleton
from trt_wan.runtime.video.reader import Picture

VISIBLE = 0.5  # a joint with a lower score is not drawn

_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
    (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85), (200, 200, 0), (100, 100, 0),
)  # fmt: skip
_LIMB_COLOURS = tuple(tuple(int(c * 0.6) for c in colour) for colour in _COLOURS)
_FINGERS = tuple(
    (0 if joint == 0 else 4 * finger + joint, 4 * finger + joint + 1)
    for finger in range(5)
    for joint in range(4)
)
_FINGER_COLOURS = tuple(tuple(c * 255 for c in colorsys.hsv_to_rgb(i / 20, 1.0, 1.0)) for i in range(20))
_HAND_JOINT_COLOUR = (0, 0, 255)

Joint = tuple[float, float] | None  # None: not drawn


def draw_skeleton(
    skeleton: Skeleton, width: int, height: int, *, hands: bool = True, head: bool = True
) -> Picture:
    """uint8 RGB [height, width, 3]. The skeleton is in pixels of this picture."""
    canvas = np.zeros((height, width, 3), np.uint8)
    body_stick = max(int(min(height, width) / 200) - 1, 1)
    joints = _visible(skeleton.body)
    if not head:
        for joint in HEAD:
            joints[joint] = None
    _draw_body(canvas, joints, body_stick)
    if hands:
        for hand in (skeleton.left_hand, skeleton.right_hand):
            _draw_hand(canvas, _visible(hand), max(body_stick // 2, 1))
    return canvas


def _visible(points: Points) -> list[Joint]:
    return [(x, y) if score >= VISIBLE else None for x, y, score in points.tolist()]


def _draw_body(canvas: Picture, joints: list[Joint], stick: int) -> None:
    for (one, other), colour in zip(LIMBS, _LIMB_COLOURS, strict=False):
        a, b = joints[one], joints[other]
        if a is None or b is None:
            continue
        centre = (int((a[0] + b[0]) / 2), int((a[1] + b[1]) / 2))
        dx, dy = a[0] - b[0], a[1] - b[1]
        axes = (int(math.hypot(dx, dy) / 2), stick)
        angle = int(math.degrees(math.atan2(dy, dx)))
        outline = np.asarray(cv2.ellipse2Poly(centre, axes, angle, 0, 360, 1), np.int32)
        cv2.fillConvexPoly(canvas, outline, colour)
    for joint, colour in zip(joints, _COLOURS, strict=True):
        if joint is not None:
            cv2.circle(canvas, (int(joint[0]), int(joint[1])), stick, colour, -1)


def _draw_hand(canvas: Picture, joints: list[Joint], stick: int) -> None:
    # Unlike a body joint, a hand joint at 0 or below is not drawn.
    pixels = [
        None if joint is None or int(joint[0]) <= 0 or int(joint[1]) <= 0 else (int(joint[0]), int(joint[1]))
        for joint in joints
    ]
    for (one, other), colour in zip(_FINGERS, _FINGER_COLOURS, strict=True):
        a, b = pixels[one], pixels[other]
        if a is not None and b is not None:
            cv2.line(canvas, a, b, colour, stick)
    for pixel in pixels:
        if pixel is not None:
            cv2.circle(canvas, pixel, stick, _HAND_JOINT_COLOUR, -1)
