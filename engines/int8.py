"""int8 weights of linear layers in a rotated basis, as int8 ConvRot files have them (files_and_loras.md 7).

Each run of GROUP input columns is multiplied by H, a Hadamard matrix over its root, which is its own inverse.
Tokens that are rotated as well have the same products: x H (W H)^T = x W^T. Outlier channels are spread over
their group, so that a scale per row and per token suffices.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

INT8 = np.dtype(np.int8)
INT8_MAX = 127.0
GROUP = 256


@cache
def hadamard(group: int) -> NDArray[np.float32]:
    """H [group, group], a power of 4: the Kronecker product of 4x4 matrices of halves, negative ones on the
    anti-diagonal.
    """
    factor = np.ones((4, 4), np.float32) - 2 * np.eye(4, dtype=np.float32)[::-1]
    return np.kron(hadamard(group // 4), factor / 2) if group > 1 else np.ones((1, 1), np.float32)


def rotated(values: NDArray[np.float32], group: int = GROUP) -> NDArray[np.float32]:
    """Each run of `group` columns times H."""
    return (values.reshape(-1, group) @ hadamard(group)).reshape(values.shape)


def quantise_rows(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """int8 values of the rotated [out, in], and float32 [out]: a scale per row, its largest magnitude over
    INT8_MAX.
    """
    turned = rotated(weight)
    scale = np.maximum(np.abs(turned).max(axis=1) / np.float32(INT8_MAX), np.float32(1e-12))
    return np.rint(turned / scale[:, None]).astype(INT8), scale
