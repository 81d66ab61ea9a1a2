"""A picture painted by hand that corrects the masks of all frames: white adds, black takes away, transparent
pixels leave the mask as it is.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from trt_wan.errors import InputError
from trt_wan.preprocess.clips.sizes import Size
from trt_wan.preprocess.pictures.masks import Mask
from trt_wan.runtime.video.pictures import read_transparent

HALF = 128  # levels up to 255: pixels from this opacity on are painted, from this brightness on white


@dataclass(frozen=True)
class Paint:
    """Both are bool [H, W] of the frame, and no pixel is true in both."""

    white: Mask
    black: Mask

    def over(self, mask: Mask) -> Mask:
        return (mask | self.white) & ~self.black


def read_paint(path: Path, frame: Size) -> Paint:
    """Stretches the picture onto the frame: each pixel of the frame takes the one under its centre.

    Raises InputError.
    """
    picture = read_transparent(path)
    if picture.opacity is None:
        raise InputError(
            f"{path} has no transparent pixels, so nothing of the mask that is found would be left.",
            "Save it as a PNG that is transparent where the mask should stay.",
        )
    painted = picture.opacity >= HALF
    bright = cv2.cvtColor(picture.pixels, cv2.COLOR_RGB2GRAY) >= HALF
    return Paint(_stretched(painted & bright, frame), _stretched(painted & ~bright, frame))


def _stretched(mask: Mask, size: Size) -> Mask:
    stretched = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(stretched, np.uint8).view(np.bool_)
