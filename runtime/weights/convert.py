"""The two sources of weights for the GPU: checkpoint files, and seeded random numbers.

Files keep their bytes where the type is what the graph takes: a scaled-FP8 checkpoint reaches the GEMM bit
for bit. Other linear weights become bf16, or are quantised with one scale per output channel, on the device
where they stay there.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import Part, Tensor, scale_name
from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.on_device import Pack
from trt_wan.runtime.weights.random import random_moments

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
RANDOM_E4M3_DEVIATION = 100.0  # of random FP8 values: 448 is 4.5 deviations away


class FileSource:
    def __init__(self, checkpoints: Mapping[Part, Checkpoint]) -> None:
        self.checkpoints = checkpoints

    def fill_device(self, gpu: Gpu, pack: Pack, arrays: Mapping[str, DeviceArray]) -> None:
        for tensor in _stored(pack):
            checkpoint, key = self._find(pack, tensor)
            if tensor.dtype == E4M3 and checkpoint.raw(key).dtype != E4M3:
                values = _as_bf16(checkpoint, key)
                buffer = gpu.allocate(values.nbytes)  # the arena is planned without weights
                weight = gpu.view(int(buffer.handle), values.shape, values.dtype)
                gpu.write(weight, values)
                gpu.quantize_rows(weight, arrays[tensor.name], arrays[scale_name(tensor.name)])
                buffer.close(gpu.stream)
                continue
            for name, values in _as_contract(checkpoint, key, tensor).items():
                gpu.write(arrays[name], values)

    def fill_host(self, pack: Pack, target: NDArray[np.uint8]) -> None:
        for tensor in _stored(pack):
            for name, values in _as_contract(*self._find(pack, tensor), tensor).items():
                _place(pack, name, values, target)

    def _find(self, pack: Pack, tensor: Tensor) -> tuple[Checkpoint, str]:
        return self.checkpoints[pack.network.part], pack.network.weight_key(tensor.name, pack.n)


def _scales(pack: Pack) -> dict[str, Tensor]:
    """The FP8 weights of a pack by the names of their scales."""
    return {scale_name(t.name): t for t in pack.network.weights if t.dtype == E4M3}


def _stored(pack: Pack) -> list[Tensor]:
    """The tensors that a file has; the scales come with their weights."""
    scales = _scales(pack)
    return [tensor for tensor in pack.network.weights if tensor.name not in scales]


def _as_contract(checkpoint: Checkpoint, key: str, tensor: Tensor) -> dict[str, NDArray[Any]]:
    """The tensor in its contract's type, and the scale if that is FP8, by name."""
    if tensor.dtype == BF16:
        return {tensor.name: _as_bf16(checkpoint, key)}
    if tensor.dtype != E4M3:
        return {tensor.name: checkpoint[key]}
    values: NDArray[Any] = checkpoint.raw(key)
    if values.dtype == E4M3:
        scale = checkpoint.scales(key)
    else:
        weight = _as_bf16(checkpoint, key).astype(np.float32)
        scale = np.maximum(np.abs(weight).max(axis=1) / np.float32(E4M3_MAX), np.float32(1e-12))
        values = (weight / scale[:, None]).astype(E4M3)
    return {tensor.name: values, scale_name(tensor.name): scale}


def _as_bf16(checkpoint: Checkpoint, key: str) -> NDArray[Any]:
    values: NDArray[Any] = checkpoint.raw(key)
    return values if values.dtype == BF16 else checkpoint[key].astype(BF16)


def _place(pack: Pack, name: str, values: NDArray[Any], target: NDArray[np.uint8]) -> None:
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    target[pack.offsets[name] : pack.offsets[name] + len(flat)] = flat


class RandomSource:
    """Weights of any model without its files: speed and numerics can be shown with them, pictures cannot."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._host: dict[str, NDArray[np.uint8]] = {}

    def fill_device(self, gpu: Gpu, pack: Pack, arrays: Mapping[str, DeviceArray]) -> None:
        for tensor in pack.network.weights:
            mean, deviation = _moments(pack, tensor)
            seed = zlib.crc32(pack.network.weight_key(tensor.name, pack.n).encode(), self.seed)
            gpu.fill_random(arrays[tensor.name], seed, mean, deviation)

    def fill_host(self, pack: Pack, target: NDArray[np.uint8]) -> None:
        """Of every network one set, made once: every set has as many bytes, which is what streaming moves."""
        name = pack.network.name
        if name not in self._host:
            rng = np.random.default_rng(self.seed)
            made = self._host.setdefault(name, np.zeros(pack.size, np.uint8))
            for tensor in pack.network.weights:
                mean, deviation = _moments(pack, tensor)
                values = rng.standard_normal(tensor.shape, np.float32) * np.float32(deviation) + np.float32(
                    mean
                )
                if tensor.dtype == E4M3:
                    values = values.clip(-E4M3_MAX, E4M3_MAX)
                _place(pack, tensor.name, values.astype(tensor.dtype), made)
        target[:] = self._host[name]


def _moments(pack: Pack, tensor: Tensor) -> tuple[float, float]:
    """Mean and standard deviation; FP8 values times their scale have those of the weight they stand for."""
    scales = _scales(pack)
    if tensor.name in scales:
        weight = scales[tensor.name]
        _, deviation = random_moments(pack.network.weight_key(weight.name, pack.n), weight.shape)
        return deviation / RANDOM_E4M3_DEVIATION, 0.0
    if tensor.dtype == E4M3:
        return 0.0, RANDOM_E4M3_DEVIATION
    return random_moments(pack.network.weight_key(tensor.name, pack.n), tensor.shape)
