"""Removes the person from the driving picture.

Frames are uint8 RGB [H, W, 3], masks bool [H, W], true where the model paints.
"""

import cv2
import numpy as np

from trt_wan.preprocess.pictures.masks import Mask
from trt_wan.runtime.video.reader import Picture


def cut_hole(frame: Picture, mask: Mask) -> Picture:
    """The frame, black inside the mask: to the model black is a hole in a known picture."""
    known = (~mask).view(np.uint8)
    return np.asarray(cv2.copyTo(frame, known, np.zeros_like(frame)), np.uint8)
