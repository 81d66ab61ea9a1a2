"""FP8 is E4M3 everywhere: its type, its largest number, and how rows of weights are quantised to it."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0


def quantise_rows(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """E4M3 values of [out, in], and float32 [out]: a scale per row, its largest magnitude over E4M3_MAX."""
    scale = np.maximum(np.abs(weight).max(axis=1) / np.float32(E4M3_MAX), np.float32(1e-12))
    return (weight / scale[:, None]).astype(E4M3), scale
