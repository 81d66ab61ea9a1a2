"""Sizes of pictures: the video's size from the requested size, and how pictures are resized to it.

`official` (Wan2.2): the requested width x height is an area. The result keeps the picture's shape, in steps
of 16. `kijai` (ComfyUI wrapper): the result is the requested size in steps of 16, and a picture of another
shape is stretched, padded or cropped. The geometry is the wrapper's, the filters are OpenCV's.

Pictures are uint8 [H, W, 3]. Sizes are (width, height), as users write them.
"""

import math
from typing import Literal

import cv2
import numpy as np

from trt_wan.errors import InputError, UsageError
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.video.reader import Picture

Size = tuple[int, int]
SizeRule = Literal["official", "kijai"]
Fit = Literal["stretch", "pad", "crop"]

STEP = 16  # px per token: 8 of the VAE times 2 of the patches


def output_size(picture: Size, asked: Size, rule: SizeRule, divisor: int = STEP) -> Size:
    """Size of the video to make from a picture, given the requested size."""
    if min(picture) < 1 or min(asked) < 1:
        raise UsageError(f"A video cannot be {asked[0]}x{asked[1]}.", "Give a size such as 832x480.")
    if rule == "official":
        return _by_area(picture, asked[0] * asked[1], divisor)
    size = asked[0] // divisor * divisor, asked[1] // divisor * divisor
    if min(size) < 1:
        raise UsageError(
            f"{asked[0]}x{asked[1]} is too small: the sides of a video are multiples of {divisor}.",
            "Give a size such as 832x480.",
        )
    return size


def resize_by_area(picture: Picture, area: int, divisor: int = STEP) -> Picture:
    """The picture at about `area` pixels in its own shape. Both sides are multiples of `divisor`."""
    height, width = picture.shape[:2]
    new_width, new_height = _by_area((width, height), area, divisor)
    shrinks = new_width * new_height < width * height
    return letterbox(picture, new_width, new_height, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def fit(picture: Picture, height: int, width: int, how: Fit) -> Picture:
    """The picture at exactly this size, as the wrapper's resize node does it.

    pad: at the top, centred from left to right, border pixels repeated (the workflows' reference picture).
    crop: around the centre (the workflows' driving video). stretch: the wrapper's default for a picture of
    another size.
    """
    old_height, old_width = picture.shape[:2]
    if how == "pad":
        scale = min(width / old_width, height / old_height)
        new_width, new_height = round(old_width * scale), round(old_height * scale)
        left = (width - new_width) // 2
        # The node rounds the picture's sides down to steps of 16 after it has placed the left edge.
        new_width, new_height = (max(side // STEP * STEP, 1) for side in (new_width, new_height))
        sides = (0, height - new_height, left, width - new_width - left)
        resized = _smooth(picture, new_width, new_height)
        return np.asarray(cv2.copyMakeBorder(resized, *sides, cv2.BORDER_REPLICATE), np.uint8)
    if how == "crop":
        shape = width / height
        if old_width / old_height > shape:
            kept = max(round(old_height * shape), 1)
            x = (old_width - kept) // 2
            picture = picture[:, x : x + kept]
        else:
            kept = max(round(old_width / shape), 1)
            y = (old_height - kept) // 2
            picture = picture[y : y + kept]
    return _smooth(picture, width, height)


def _by_area(picture: Size, area: int, divisor: int) -> Size:
    """Wan2.2's fallback, which it always uses: its search for a better size never succeeds."""
    shape = picture[0] / picture[1]
    height = math.sqrt(area / shape)
    width = area / height
    size = int(width // divisor * divisor), int(height // divisor * divisor)
    if min(size) < 1:
        raise InputError(
            f"A picture of {picture[0]}x{picture[1]} is too thin for a video of {area} pixels.",
            "Crop it to a shape between 1:8 and 8:1.",
        )
    return size


def _smooth(picture: Picture, width: int, height: int) -> Picture:
    shrinks = width * height < picture.shape[0] * picture.shape[1]
    return _resized(picture, width, height, cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4)


def _resized(picture: Picture, width: int, height: int, interpolation: int) -> Picture:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(cv2.resize(picture, (width, height), interpolation=interpolation), np.uint8)
