"""The pixels of a resampled picture: two for every column and every row, with their weights.

The host makes these tables and the kernels of frames.cu multiply and add, so the position of a sample is
defined once. `first` and `second` are pixels of the frame.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[Any]  # elements of one of the two types below

TAP = np.dtype([("first", "<i4"), ("second", "<i4"), ("first_weight", "<f4"), ("second_weight", "<f4")])
WHOLE_TAP = np.dtype([("first", "<i4"), ("second", "<i4"), ("first_weight", "<i4"), ("second_weight", "<i4")])
WHOLE = 2048  # a weight of 1 in OpenCV's arithmetic for uint8


@lru_cache(maxsize=16)
def stretch_taps(width: int, height: int, to_width: int, to_height: int) -> tuple[Table, Table]:
    """Columns and rows of cv2.resize(INTER_LINEAR) of a uint8 frame.

    At the border OpenCV uses one column with full weight, but two equal rows with parts: their roundings
    differ.
    """
    columns, rows = _opencv_taps(width, to_width), _opencv_taps(height, to_height)
    alone = columns["first"] == columns["second"]
    columns["first_weight"][alone], columns["second_weight"][alone] = WHOLE, 0
    return columns, rows


def _opencv_taps(source: int, target: int) -> Table:
    scale = 1 / (target / source)
    at = ((np.arange(target) + 0.5) * scale - 0.5).astype(np.float32)
    low = np.floor(at)
    part = at - low
    table = np.empty(target, WHOLE_TAP)
    table["first"], table["second"] = low.clip(0, source - 1), (low + 1).clip(0, source - 1)
    table["first_weight"] = np.rint((1 - part) * np.float32(WHOLE))  # halves to even
    table["second_weight"] = np.rint(part * np.float32(WHOLE))
    return table


def crop_table(taps: list[tuple[NDArray[np.intp], Table]]) -> Table:
    """The result of crops.taps as a table."""
    (first, first_weight), (second, second_weight) = taps
    table = np.empty(len(first), TAP)
    table["first"], table["second"] = first, second
    table["first_weight"], table["second_weight"] = first_weight, second_weight
    return table
