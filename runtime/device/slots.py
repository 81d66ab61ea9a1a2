"""Arrays on the GPU along their slots, axis 1 of [channels, slots, h, w]: taken, joined and blended.

Windows of a long video need this. Everything is enqueued on the compute stream and nothing waits.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trt_wan.runtime.device.checked import cuda
from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, read_source

NAMES = ("blend",)
SOURCE = read_source(__package__, "slots.cu")
MAX_BLOCKS = 8192  # the kernel strides over the rest

BlendPart = tuple[Sequence[int], Sequence[float], Any]  # slots of the result, their weights, an array


def take(gpu: Gpu, array: Any, slots: Sequence[int]) -> DeviceArray:
    source = on_device(gpu, array)
    out = gpu.empty((source.shape[0], len(slots), *source.shape[2:]), source.dtype)
    for to, start, count in runs(slots):
        _copy(gpu, out, to, source, start, count)
    return out


def join(gpu: Gpu, arrays: Sequence[Any]) -> DeviceArray:
    sources = [on_device(gpu, array) for array in arrays]
    first = sources[0]
    total = sum(source.shape[1] for source in sources)
    out = gpu.empty((first.shape[0], total, *first.shape[2:]), first.dtype)
    to = 0
    for source in sources:
        assert source.dtype == first.dtype, f"{source.dtype} is joined to {first.dtype}"
        _copy(gpu, out, to, source, 0, source.shape[1])
        to += source.shape[1]
    return out


def blend(gpu: Gpu, slots: int, parts: Sequence[BlendPart], onto: Any = None) -> DeviceArray:
    module = gpu.once(__name__, lambda: Module(gpu.device, SOURCE, NAMES))
    sources = [on_device(gpu, array) for *_, array in parts]
    channels, _, *picture = sources[0].shape
    out: DeviceArray = gpu.empty((channels, slots, *picture), np.float32) if onto is None else onto
    if onto is None:
        _clear(gpu, out)
    inner = math.prod(picture)
    grid = min(-(-channels * inner // THREADS), MAX_BLOCKS)
    for (into, weights, _), source in zip(parts, sources, strict=True):
        assert source.dtype == np.float32, f"blend takes float32, got {source.dtype}"
        for k, (slot, weight) in enumerate(zip(into, weights, strict=True)):
            assert 0 <= slot < slots, f"slot {slot} of {slots}"
            module.launch(
                gpu.stream,
                "blend",
                grid,
                THREADS,
                out.address + slot * inner * 4,
                source.address + k * inner * 4,
                np.int64(channels * inner),
                np.int64(inner),
                np.int64(slots * inner),
                np.int64(source.shape[1] * inner),
                np.float32(weight),
            )
    return out


def put_rows(gpu: Gpu, onto: Any, array: Any, start: int, stop: int) -> DeviceArray:
    """Rows of axis 0, in place."""
    target, source = on_device(gpu, onto), on_device(gpu, array)
    assert target.shape == source.shape and target.dtype == source.dtype, "other shapes or types"
    assert 0 <= start <= stop <= target.shape[0], f"rows {start} to {stop} of {target.shape[0]}"
    row = target.nbytes // target.shape[0]
    gpu.copy(target.address + start * row, source.address + start * row, (stop - start) * row, gpu.stream)
    return target


def runs(slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place in the result, first slot, count) for every run of consecutive slots."""
    start = 0
    for k in range(1, len(slots) + 1):
        if k == len(slots) or slots[k] != slots[k - 1] + 1:
            yield start, slots[start], k - start
            start = k


def on_device(gpu: Gpu, array: Any) -> DeviceArray:
    return array if isinstance(array, DeviceArray) else gpu.upload(np.asarray(array))


def _copy(gpu: Gpu, out: DeviceArray, to: int, source: DeviceArray, start: int, count: int) -> None:
    """Enqueues the copy of slots `start`… of every channel into slots `to`… of `out`."""
    from cuda.bindings import runtime

    assert 0 <= start and start + count <= source.shape[1], f"slots {start} + {count} of {source.shape[1]}"
    slot = math.prod(source.shape[2:]) * source.dtype.itemsize
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    cuda(
        runtime.cudaMemcpy2DAsync(
            out.address + to * slot,
            out.shape[1] * slot,
            source.address + start * slot,
            source.shape[1] * slot,
            count * slot,
            source.shape[0],
            kind,
            gpu.handle,
        )
    )


def _clear(gpu: Gpu, array: DeviceArray) -> None:
    from cuda.bindings import runtime

    cuda(runtime.cudaMemsetAsync(array.address, 0, array.nbytes, gpu.handle))
