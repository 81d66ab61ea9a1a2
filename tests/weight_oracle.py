"""Weights in their contracts' types by numpy, in one go: the slow, simple version of convert.cu.

GGUF blocks are decoded by the gguf package.
"""

from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import Tensor, scale_name
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.stored import Stored, Tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def converted(values: NDArray[Any], scales: NDArray[np.float32] | None, dtype: Any) -> NDArray[Any]:
    """`values` [rows, ...] in another type."""
    if values.dtype == dtype and scales is None:
        return values
    result = values.astype(np.float32)
    if scales is not None:
        result = result * scales.reshape(-1, *[1] * (values.ndim - 1))
    return result.astype(dtype)


def quantised(
    values: NDArray[Any], scales: NDArray[np.float32] | None
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """E4M3 [rows, inner] and float32 [rows]: a scale for each output channel."""
    weight = converted(values, scales, BF16).astype(np.float32)
    scale = np.maximum(np.abs(weight).max(axis=1) / np.float32(448), np.float32(1e-12))
    return (weight / scale[:, None]).astype(E4M3), scale


def int8_rows(turned: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """int8 [rows, inner] of rotated rows, and float32 [rows]: a scale for each output channel."""
    scale = np.maximum(np.abs(turned).max(axis=1) / np.float32(127), np.float32(1e-12))
    return np.rint(turned / scale[:, None]).astype(np.int8), scale


def plain(values: NDArray[Any], blocks: str) -> NDArray[Any]:
    """The numbers of GGUF blocks [rows, bytes]; other values as they are."""
    if not blocks:
        return values
    with np.errstate(invalid="ignore", over="ignore"):
        return gguf.dequantize(values, gguf.GGMLQuantizationType[blocks])


def rotated(values: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    """Number i of each four at a distance of 1, 4, 16 … becomes half their sum less number 3 - i."""
    result = values.reshape(-1, group).copy()
    for width in (1, 4, 16, 64, 256):
        for i in range(group) if width < group else ():
            if i // width % 4 == 0:
                four = [result[:, i + k * width].copy() for k in range(4)]
                half = ((four[0] + four[1]) + (four[2] + four[3])) / 2
                for k in range(4):
                    result[:, i + k * width] = half - four[3 - k]
    return result.reshape(values.shape)


def as_contract(stored: Stored, tensor: Tensor) -> dict[str, NDArray[Any]]:
    """The tensor, and the scale if it has 8 bits, by name."""
    if tensor.dtype == "int8" and stored.dtype == np.int8 and stored.rotation == 256:
        assert stored.scales is not None
        return {tensor.name: stored.values, scale_name(tensor.name): stored.scales}
    numbers, scales = plain(stored.values, stored.blocks).reshape(stored.shape), stored.scales
    if stored.rotation:
        numbers, scales = rotated(converted(numbers, scales, np.float32), stored.rotation), None
    if tensor.dtype == "int8":
        values, scale = int8_rows(rotated(converted(numbers, scales, np.dtype(np.float32)), 256))
        return {tensor.name: values, scale_name(tensor.name): scale}
    if np.dtype(tensor.dtype) != E4M3:
        return {tensor.name: converted(numbers, scales, np.dtype(tensor.dtype))}
    if stored.dtype == E4M3 and not stored.rotation:
        scale = np.ones(tensor.shape[0], np.float32) if stored.scales is None else stored.scales
        return {tensor.name: stored.values, scale_name(tensor.name): scale}
    values, scale = quantised(numbers, scales)
    return {tensor.name: values, scale_name(tensor.name): scale}


def contents(pack: Pack, tensors: Tensors) -> dict[str, bytes]:
    """The bytes of every tensor of a pack."""
    made: dict[str, bytes] = {}
    for tensor in pack.network.weights:
        if tensor.name not in pack.scaled:
            stored = tensors.stored(pack.network.weight_key(tensor.name, pack.n))
            made |= {name: values.tobytes() for name, values in as_contract(stored, tensor).items()}
    assert made.keys() == {tensor.name for tensor in pack.network.weights}
    return made
