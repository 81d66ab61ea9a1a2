"""Puts the untouched pixels around the character back into the finished frames (mode replace).

Frames are uint8 RGB [H, W, 3], masks bool [H, W], true where the model paints.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.video.clips import frames_of, people_of
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.stills import open_clip

Mask = NDArray[np.bool_]
SOFT_EDGE = 16  # pixels outside the mask over which the painted picture blends into the original


def paste_back(painted: Picture, original: Picture, mask: Mask, soft_edge: int = SOFT_EDGE) -> Picture:
    """The painted picture inside the mask, the original's own pixels from `soft_edge` pixels outside it on.

    The ramp lies outside the mask, so that neither the hole nor the original person shows through.
    `original` is read outside the mask only, so a background with its hole works too.
    """
    if not mask.any():
        return original
    # Distance in pixels to the nearest pixel of the mask; 0 on it.
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    ours = np.clip(1 - away / (soft_edge + 1), 0, 1)[..., None]
    mixed = painted * ours + original * (1 - ours)
    return np.rint(mixed).astype(np.uint8)


def pasted_back(
    painted: Iterable[Picture], background: Path, mask: Path, cut: Cut | None = None, first: int = 0
) -> Iterator[Picture]:
    """`paste_back` for a video from frame `first` on. `background` and `mask` are its prepared clips, cut by
    `cut`.
    """
    with open_clip(background, one=True, cut=cut) as original, open_clip(mask, one=True, cut=cut) as masks:
        for k, picture in enumerate(painted, first):
            here = people_of(frames_of(masks, [k]))[0]
            yield paste_back(picture, frames_of(original, [k])[0], here)
