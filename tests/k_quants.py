"""K-quants of GGUF written from float32, by the range of each sub-block: no better than that, but valid.

The gguf package reads these types and does not write them. A block is 256 numbers, in sub-blocks of 16 or 32.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.uint8]  # [blocks, bytes]


def quantise(values: NDArray[np.float32], kind: str) -> Blocks:
    """[rows, columns] to uint8 [rows, bytes per row]."""
    return WRITERS[kind](values.reshape(-1, 256)).reshape(len(values), -1)


def _q2_k(values: NDArray[np.float32]) -> Blocks:
    q, scales, minima, halves = _lines(values, 16, 3, 15)
    return _together(scales | minima << 4, _two_bits(q), *halves)


def _q3_k(values: NDArray[np.float32]) -> Blocks:
    q, scales, half = _multiples(values, 4, 31)
    q, scales = q + 4, scales + 32
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = sum((scales.reshape(-1, 4, 4)[:, i] >> 4) << 2 * i for i in range(4))
    return _together(_bits(q >> 2), _two_bits(q & 3), low, high, half)


def _q4_k(values: NDArray[np.float32]) -> Blocks:
    q, scales, minima, halves = _lines(values, 32, 15, 63)
    return _together(*halves, *_six_bits(scales, minima), _nibbles(q, 32))


def _q5_k(values: NDArray[np.float32]) -> Blocks:
    q, scales, minima, halves = _lines(values, 32, 31, 63)
    return _together(*halves, *_six_bits(scales, minima), _bits(q >> 4), _nibbles(q & 15, 32))


def _q6_k(values: NDArray[np.float32]) -> Blocks:
    q, scales, half = _multiples(values, 32, 127)
    return _together(_nibbles(q + 32 & 15, 64), _two_bits(q + 32 >> 4), scales, half)


WRITERS = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


def _lines(values: NDArray[np.float32], size: int, most: int, levels: int) -> Any:
    """q up to `most`, and scales and minima up to `levels`: a number is d * scale * q - dmin * minimum."""
    parts = values.reshape(len(values), -1, size)
    low = np.minimum(parts.min(axis=2), 0)
    scales, d = _levels((parts.max(axis=2) - low) / most, levels)
    minima, dmin = _levels(-low, levels)
    q = (parts + (dmin * minima)[..., None]) / np.maximum(d * scales, 1e-30)[..., None]
    q = np.clip(np.rint(q), 0, most).astype(np.int64)
    return q.reshape(len(values), -1), scales, minima, (_half(d), _half(dmin))


def _multiples(values: NDArray[np.float32], most: int, levels: int) -> Any:
    """q of -most to most - 1, and scales of 0 to `levels`: a number is d * scale * q."""
    parts = values.reshape(len(values), -1, 16)
    scales, d = _levels(np.abs(parts).max(axis=2) / most, levels)
    q = np.rint(parts / np.maximum(d * scales, 1e-30)[..., None])
    return np.clip(q, -most, most - 1).astype(np.int64).reshape(len(values), -1), scales, _half(d)


def _levels(scales: Any, levels: int) -> Any:
    """Integers [blocks, sub-blocks], and the unit of each block as its half has it."""
    unit = (scales.max(axis=1, keepdims=True) / levels).astype(np.float16).astype(np.float32)
    return np.clip(np.rint(scales / np.maximum(unit, 1e-30)), 0, levels).astype(np.int64), unit


def _half(unit: Any) -> Blocks:
    return unit.astype(np.float16).view(np.uint8)


def _nibbles(q: Any, width: int) -> Any:
    pairs = q.reshape(len(q), -1, 2, width)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(q), -1)


def _two_bits(q: Any) -> Any:
    fours = q.reshape(len(q), 2, 4, 32)
    return sum(fours[:, :, i] << 2 * i for i in range(4)).reshape(len(q), -1)


def _bits(q: Any) -> Any:
    eights = q.reshape(len(q), 8, 32)
    return sum(eights[:, i] << i for i in range(8))


def _six_bits(scales: Any, minima: Any) -> Any:
    low, high = slice(0, 4), slice(4, 8)
    yield scales[:, low] | scales[:, high] >> 4 << 6
    yield minima[:, low] | minima[:, high] >> 4 << 6
    yield scales[:, high] & 15 | (minima[:, high] & 15) << 4


def _together(*parts: Any) -> Blocks:
    return np.concatenate([part.astype(np.uint8) for part in parts], axis=1)
