"""Scales a picture to fit into a canvas and centres it on black."""

import cv2
import numpy as np

from trt_wan.runtime.video.reader import Picture


def letterbox(picture: Picture, width: int, height: int, interpolation: int = cv2.INTER_LINEAR) -> Picture:
    """uint8 [h, w, 3] to [height, width, 3] (model_spec.md 2.3). A picture that fits is returned itself."""
    if picture.shape[:2] == (height, width):
        return picture
    h, w = picture.shape[:2]
    if h / w > height / width:
        # The order of operations is the official code's: the size depends on the last bit.
        new_width, new_height = max(int(height / h * w), 1), height
    else:
        new_width, new_height = width, max(int(width / w * h), 1)
    resized = cv2.resize(picture, (new_width, new_height), interpolation=interpolation)
    canvas = np.zeros((height, width, picture.shape[2]), np.uint8)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas
