"""FP8 weights as the GPU's loader makes them (convert.cu), on the CPU: E4M3 with a scale per output row.

numpy's cast to E4M3 takes 19 ns a number, four and a half minutes for the 14B. Here the upper half of a
float32 is looked up in a table, with its last bit set if anything was cut off (round to odd): the seven bits
of the mantissa that are left decide the rounding to three as all 23 would.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.fp8 import E4M3, E4M3_MAX
from trt_wan.runtime.weights.stored import Stored

CHUNK = 1 << 18  # numbers at a time: they stay in the cache of a core
LEAST_SCALE = np.float32(1e-12)


def quantised(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """E4M3 in the shape of `weight` [rows, ...], and float32 [rows]: the largest magnitude of each row,
    rounded to bf16, over 448.
    """
    rows = weight.reshape(len(weight), -1)
    values, scales = np.empty(rows.shape, np.uint8), np.empty(len(rows), np.float32)
    step = max(1, CHUNK // max(1, rows.shape[1]))

    def quantise(first: int) -> None:
        part = slice(first, first + step)
        rounded = _as_bf16(rows[part])
        most = np.maximum(rounded.max(axis=1), -rounded.min(axis=1))
        scales[part] = np.maximum(most / np.float32(E4M3_MAX), LEAST_SCALE)
        rounded /= scales[part, None]
        values[part] = _table()[_halves(rounded)]

    with ThreadPoolExecutor() as threads:
        list(threads.map(quantise, range(0, len(rows), step)))
    return values.view(E4M3).reshape(weight.shape), scales


def decoded(stored: Stored) -> NDArray[np.float32]:
    """The numbers of a weight, float32, added up in the kernel's order where its columns are rotated."""
    plain = replace(stored, rotation=0).float32()
    if stored.rotation:
        rows = plain.reshape(-1, stored.rotation)
        for first in range(0, len(rows), CHUNK // stored.rotation):
            part = slice(first, first + CHUNK // stored.rotation)
            rows[part] = _rotated(rows[part])
    return plain


def _rotated(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows times H of files_and_loras.md 7, one pass for each of its 4x4 factors J/2 - P, J of ones and P the
    reversal. `int8.rotated` is a product with H, which rounds otherwise.
    """
    width = 1
    while width < rows.shape[1]:
        x = rows.reshape(-1, 4, width)
        half = ((x[:, 0] + x[:, 1]) + (x[:, 2] + x[:, 3])) * np.float32(0.5)
        rows = (half[:, None] - x[:, ::-1]).reshape(rows.shape)
        width *= 4
    return rows


def _as_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to the nearest bf16, ties to even; still float32. A new array."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded &= np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _halves(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper 16 bits, the last one set if the lower ones are not 0."""
    bits = values.view(np.uint32)
    upper = (bits >> np.uint32(16)).astype(np.uint16)
    upper |= (bits & np.uint32(0xFFFF)) != 0
    return upper


@cache
def _table() -> NDArray[np.uint8]:
    """The E4M3 code of every upper half."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    with np.errstate(invalid="ignore", over="ignore"):
        return upper.view(np.float32).astype(E4M3).view(np.uint8)
