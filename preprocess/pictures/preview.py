"""The clip for checking a preparation: person, pose, face and mask drawn over the frame."""

import functools
import math
from dataclasses import replace

import cv2
import numpy as np
from cv2.typing import MatLike

from trt_wan.preprocess.clips.sizes import Size
from trt_wan.preprocess.people.person import Box
from trt_wan.preprocess.people.skeleton import Points, Skeleton
from trt_wan.preprocess.pictures.draw import draw_skeleton
from trt_wan.preprocess.pictures.masks import Mask
from trt_wan.runtime.video.reader import Picture

AREA = 832 * 480  # pixels: a preview of a 4K clip need not be 4K
FRAME_COLOUR, FACE_COLOUR, MASK_COLOUR = (255, 255, 255), (255, 220, 0), (255, 40, 160)
EDGE_COLOUR = (255, 160, 210)
# The tinted colour of each level, [1, 256, 3].
TINT = ((np.arange(256)[None, :, None] * 3 + np.asarray(MASK_COLOUR) * 2) // 5).astype(np.uint8)
FONT = cv2.FONT_HERSHEY_SIMPLEX


def preview_size(size: Size) -> Size:
    """Even sides, the same shape, at most AREA."""
    scale = min(1.0, math.sqrt(AREA / (size[0] * size[1])))
    width, height = (max(2, round(side * scale / 2) * 2) for side in size)
    return width, height


def draw_preview(
    frame: Picture,
    skeleton: Skeleton,
    person: Box | None,
    face: Box | None,
    mask: Mask | None,
    label: str,
) -> Picture:
    """All places, and the mask, are in the frame's pixels."""
    height, width = frame.shape[:2]
    size = preview_size((width, height))
    across, down = size[0] / width, size[1] / height
    picture = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
    if mask is not None:
        _tint(picture, cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST))
    drawn = draw_skeleton(_scaled(skeleton, across, down, size), *size)
    cv2.copyTo(drawn, functools.reduce(cv2.max, cv2.split(drawn)), picture)
    if face is not None:
        left, top, _, _ = _rectangle(picture, _sides(face, across, down), FACE_COLOUR)
        _text(picture, (left, max(top - 4, 12)), "face", FACE_COLOUR)
    if person is None:
        _text(picture, (4, size[1] - 6), f"{label}: not here", FRAME_COLOUR)
    else:
        left, _, _, bottom = _rectangle(picture, _sides(person, across, down), FRAME_COLOUR)
        _text(picture, (left + 3, bottom - 5), f"{label}  {person.score:.2f}", FRAME_COLOUR)
    return picture


def _tint(picture: Picture, mask: MatLike) -> None:
    """Colours the mask's pixels and draws a line around them."""
    cv2.copyTo(cv2.LUT(picture, TINT), mask, picture)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, EDGE_COLOUR, 1)


def _scaled(skeleton: Skeleton, across: float, down: float, size: Size) -> Skeleton:
    def scaled(points: Points) -> Points:
        return points * np.asarray((across, down, 1), np.float32)

    return replace(
        skeleton,
        body=scaled(skeleton.body),
        left_hand=scaled(skeleton.left_hand),
        right_hand=scaled(skeleton.right_hand),
        face=scaled(skeleton.face),
        width=size[0],
        height=size[1],
    )


def _sides(box: Box, across: float, down: float) -> tuple[float, float, float, float]:
    return box.x0 * across, box.y0 * down, box.x1 * across, box.y1 * down


def _rectangle(
    picture: Picture, sides: tuple[float, float, float, float], colour: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    """Draws the rectangle cut to the picture, and returns its corners."""
    height, width = picture.shape[:2]
    limits = (width - 1, height - 1, width - 1, height - 1)
    x0, y0, x1, y1 = (round(min(max(side, 0), limit)) for side, limit in zip(sides, limits, strict=True))
    cv2.rectangle(picture, (x0, y0), (x1, y1), colour, 1)
    return x0, y0, x1, y1


def _text(picture: Picture, at: tuple[int, int], text: str, colour: tuple[int, int, int]) -> None:
    """Text with a dark rim. The rim cannot be a thicker text, because OpenCV 5 also makes that wider."""
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        cv2.putText(picture, text, (at[0] + dx, at[1] + dy), FONT, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(picture, text, at, FONT, 0.45, colour, 1, cv2.LINE_AA)
