"""The part of a frame that the pose network sees: a crop around the person's box, in the network's size.

The crop and its constants are the official code's (preprocess_spec.md A1.3): a crop's border is not
shifted by half a pixel ("non-UDP").
"""

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.preprocess.people.person import Box
from trt_wan.runtime.video.reader import Picture

Array = NDArray[Any]
ChannelOrder = Literal["rgb", "bgr"]  # the official code uses bgr, which the network was not trained on

FRAME = (3, 256, 192)
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, for RGB
STD = np.array([0.229, 0.224, 0.225], np.float32)
PADDING = 1.25  # times the box, so that hands and feet at its border are inside the crop


@dataclass(frozen=True)
class Crop:
    """Centre and size are exact. Corners are whole pixels of the frame and may lie outside it."""

    centre: tuple[float, float]
    size: tuple[float, float]  # width, height in pixels
    x0: int
    y0: int
    x1: int
    y1: int


def crop_for(box: Box, width: int = FRAME[2], height: int = FRAME[1]) -> Crop:
    """The part of the frame for a network input of `width` x `height`: 1.25 times the box, widened to that
    aspect.

    The corners come from a matrix inverse as in the official code. From centre - size / 2, corners halfway
    between two pixels would be rounded differently.
    """
    (cx, cy), aspect = box.centre, width / height
    tall = max(box.width / aspect, box.height) * PADDING
    wide = tall * aspect
    if not tall:  # a box of one point
        return Crop((cx, cy), (0.0, 0.0), round(cx), round(cy), round(cx), round(cy))
    to_network = np.array(
        [
            [width / wide, 0, width * (-cx / wide + 0.5)],
            [0, height / tall, height * (-cy / tall + 0.5)],
            [0, 0, 1],
        ]
    )
    to_frame = np.linalg.inv(to_network)
    x0, y0, _ = (round(float(v)) for v in to_frame @ (0, 0, 1))  # halves to even
    x1, y1, _ = (round(float(v)) for v in to_frame @ (width, height, 1))
    return Crop((cx, cy), (wide, tall), x0, y0, x1, y1)


def cut(frame: Picture, crop: Crop, width: int, height: int) -> Array:
    """The crop at `width` x `height`, float32 [height, width, 3] in 0..255, black outside the frame.

    It equals cv2.resize(INTER_LINEAR) of the whole crop in float32, without making that crop: around a person
    in an 8K frame it would take 1.5 GB.
    """
    rows = taps(crop.y0, crop.y1, height, frame.shape[0])
    columns = taps(crop.x0, crop.x1, width, frame.shape[1])
    result = np.zeros((height, width, 3), np.float32)
    places, nothing = np.empty((height, width, 2), np.int16), np.empty(0, np.int16)
    for y, wy in rows:
        for x, wx in columns:
            places[..., 0], places[..., 1] = x, y[:, None]
            # Twice as fast as numpy's gather, and it releases the GIL.
            tap = cv2.remap(frame, places, nothing, cv2.INTER_NEAREST)
            result += tap * (wy[:, None] * wx)[..., None]
    return result


Taps = list[tuple[NDArray[np.intp], Array]]


def taps(start: int, end: int, size: int, limit: int) -> Taps:
    """For `size` samples between pixels `start` and `end`: the two neighbouring pixels of each, with their
    weights. Weights are 0 outside the frame's `limit` pixels.
    """
    length = max(end - start, 1)
    at = (np.arange(size) + 0.5) * (length / size) - 0.5
    low = np.floor(at)
    part = (at - low).astype(np.float32)
    both = []
    for offset, weight in ((0, 1 - part), (1, part)):
        pixel = (low + offset).clip(0, length - 1).astype(np.intp) + start
        inside = (pixel >= 0) & (pixel < limit)
        both.append((pixel.clip(0, limit - 1), weight * inside))
    return both


def normalised(crop: Array, order: ChannelOrder) -> Array:
    """float32 [3, H, W]. Mean and deviation are RGB's for both orders, as in the official code."""
    channels = crop if order == "rgb" else crop[..., ::-1]
    return ((channels / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)
