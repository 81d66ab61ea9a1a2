"""Resampling in numpy with separable filters, and the rules that make SAM2's input from frames. On a GPU,
resize_on_gpu.py uses the same filters from `filter_table`.

official       as Pillow's bicubic (antialiased, on uint8), then ImageNet mean and deviation
transformers   bilinear, antialiased, on uint8, then the same
kijai          bilinear without antialiasing, 0..1, no mean or deviation
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.video.reader import Picture

Values = NDArray[np.float32]
Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]
InputRule = Literal["official", "transformers", "kijai"]

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
BLOCK = 64  # outputs per matrix product: the whole matrix is nearly all zeros, its blocks are not


def model_input(frame: Picture, size: int, rule: InputRule) -> Values:
    """[3, size, size]."""
    if rule == "kijai":
        scaled = frame.astype(np.float32) / np.float32(255)
        resized = cv2.resize(scaled, (size, size), interpolation=cv2.INTER_LINEAR)
        return np.ascontiguousarray(resized.transpose(2, 0, 1), np.float32)
    kernel = _cubic if rule == "official" else _triangle
    resized = resize(frame.astype(np.float32), size, size, kernel, 2.0 if rule == "official" else 1.0, True)
    normal = (resized / np.float32(255) - MEAN) / DEVIATION
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def resize_antialiased(values: Values, height: int, width: int) -> Values:
    """[H, W] bilinear with antialiasing, in float32 throughout."""
    return resize(values[..., None], height, width, _triangle, 1.0, False)[..., 0]


def resize(values: Values, height: int, width: int, kernel: Kernel, support: float, levels: bool) -> Values:
    """[H, W, channels], columns first as in Pillow. With `levels`, rounded to 0..255 after each pass."""

    def done(x: Values) -> Values:
        return np.clip(np.floor(x + np.float32(0.5)), 0, 255) if levels else x

    rows, columns, channels = values.shape
    x: Values = np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(columns, rows * channels)
    x = done(_apply(x, width, kernel, support)).reshape(width, rows, channels)
    x = np.ascontiguousarray(x.transpose(1, 0, 2)).reshape(rows, width * channels)
    return done(_apply(x, height, kernel, support)).reshape(height, width, channels)


def bicubic_matrix(inputs: int, outputs: int) -> NDArray[np.float64]:
    """[outputs, inputs]: torch's bicubic interpolation (a = -0.75, edges repeated, no antialiasing)."""
    where = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    first = np.floor(where).astype(int)
    matrix = np.zeros((outputs, inputs))
    for tap in range(-1, 3):
        weight = _keys((where - first) - tap, -0.75)
        np.add.at(matrix, (np.arange(outputs), np.clip(first + tap, 0, inputs - 1)), weight)
    return matrix


def _apply(x: Values, outputs: int, kernel: Kernel, support: float) -> Values:
    """Filters along the first axis."""
    made = np.empty((outputs, x.shape[1]), np.float32)
    for start, low, band in _bands(x.shape[0], outputs, kernel, support):
        np.matmul(band, x[low : low + band.shape[1]], out=made[start : start + len(band)])
    return made


@cache
def _bands(inputs: int, outputs: int, kernel: Kernel, support: float) -> list[tuple[int, int, Values]]:
    """The filter's matrix in blocks: first output, first input, [outputs, inputs] of the block."""
    centre, stretch, low, high = _reach(inputs, outputs, support)
    found = []
    for start in range(0, outputs, BLOCK):
        stop = min(start + BLOCK, outputs)
        first, last = low[start], high[stop - 1]
        at = np.arange(first, last)
        weights = kernel((at[None] + 0.5 - centre[start:stop, None]) / stretch)
        weights *= (at[None] >= low[start:stop, None]) & (at[None] < high[start:stop, None])
        weights /= weights.sum(1, keepdims=True)
        found.append((start, int(first), weights.astype(np.float32)))
    return found


@cache
def filter_table(inputs: int, outputs: int, rule: InputRule) -> tuple[NDArray[np.int32], Values]:
    """The filter of a rule as taps: each output's first input, [outputs], and weights [taps, outputs]. Unused
    taps, which may lie past the last input, have weight 0.
    """
    if rule == "kijai":
        return _plain_table(inputs, outputs)
    kernel, support = (_cubic, 2.0) if rule == "official" else (_triangle, 1.0)
    centre, stretch, low, high = _reach(inputs, outputs, support)
    at = low + np.arange(int((high - low).max()))[:, None]
    weights = kernel((at + 0.5 - centre) / stretch) * (at < high)
    weights /= weights.sum(0)
    return low.astype(np.int32), weights.astype(np.float32)


def _plain_table(inputs: int, outputs: int) -> tuple[NDArray[np.int32], Values]:
    """Two taps, as in cv2's INTER_LINEAR: positions are float32, and edges are repeated."""
    where = ((np.arange(outputs) + 0.5) * (inputs / outputs) - 0.5).astype(np.float32)
    first = np.floor(where)
    share = np.where((first < 0) | (first >= inputs - 1), np.float32(0), where - first)
    weights = np.stack((1 - share, share)).astype(np.float32)
    return np.clip(first, 0, inputs - 1).astype(np.int32), weights


def _reach(
    inputs: int, outputs: int, support: float
) -> tuple[NDArray[np.float64], float, NDArray[np.int_], NDArray[np.int_]]:
    """Each output's position among the inputs, the filter's stretch, and the first and last-plus-one input of
    each output.
    """
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    centre = ((np.arange(outputs) + 0.5) * scale).astype(np.float64)
    low = np.maximum((centre - support * stretch + 0.5).astype(int), 0)
    high = np.minimum((centre + support * stretch + 0.5).astype(int), inputs)
    return centre, stretch, low, high


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.maximum(1 - np.abs(x), 0)
    return weights


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return _keys(x, -0.5)


def _keys(x: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    weights: NDArray[np.float64] = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights
