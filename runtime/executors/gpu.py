"""One GPU: a segment for every network, which share one scratch, and arrays that stay on the device.

Inputs may be numpy arrays (uploaded) or arrays of the device; outputs are arrays of the device, which numpy
functions accept and then download. One segment serves all sets of its network's weights: addresses change,
nothing else does.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from trt_wan.engines.contract import Network
from trt_wan.runtime.device import slots as on_slots
from trt_wan.runtime.device.dot import dot
from trt_wan.runtime.device.finite import is_finite
from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.executors import Array, BlendPart
from trt_wan.runtime.segments.segment import Segment
from trt_wan.runtime.weights.on_device import DeviceWeights


class GpuExecutor:
    """`segments` are by network, all of one size; `weights` are shared with other sizes."""

    def __init__(self, gpu: Gpu, segments: Mapping[str, Segment], weights: DeviceWeights) -> None:
        self.gpu, self.segments, self.weights = gpu, dict(segments), weights
        self._scratch: Any = None

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the largest segment needs; all share them."""
        return max(1, *(segment.scratch_bytes for segment in self.segments.values()))

    def start(self, scratch: int) -> None:
        """Call before a job: `scratch` is the address of at least `scratch_bytes`."""
        for segment in self.segments.values():
            segment.start(scratch)

    def start_alone(self, arena: int) -> None:
        """`start` for the only executor of a GPU: takes `arena` bytes for arrays, and the scratch."""
        self._scratch = self.gpu.allocate(self.scratch_bytes)
        self.start(int(self._scratch.handle))
        self.gpu.reserve(arena)

    def place(self, array: Array) -> Array:
        return cast(Array, self.gpu.upload(np.asarray(array)))

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        return cast(Array, self.gpu.combine(terms))

    def dot(self, x: Array, y: Array) -> float:
        return dot(self.gpu, x, y)

    def take(self, array: Array, slots: Sequence[int]) -> Array:
        return cast(Array, on_slots.take(self.gpu, array, slots))

    def join(self, arrays: Sequence[Array]) -> Array:
        return cast(Array, on_slots.join(self.gpu, arrays))

    def blend(self, slots: int, parts: Sequence[BlendPart], onto: Array | None = None) -> Array:
        return cast(Array, on_slots.blend(self.gpu, slots, parts, onto))

    def put_rows(self, onto: Array, array: Array, start: int, stop: int) -> Array:
        return cast(Array, on_slots.put_rows(self.gpu, onto, array, start, stop))

    def is_finite(self, array: Array) -> bool:
        if isinstance(array, DeviceArray):
            return is_finite(self.gpu, array)
        return bool(np.isfinite(array).all())

    def fetch(self, array: Array) -> Callable[[], Array]:
        if not isinstance(array, DeviceArray):
            return partial(np.asarray, array)
        return partial(self.gpu.download, array, self.gpu.stream.record())

    def wait(self) -> None:
        self.gpu.sync()

    def release(self, names: set[str]) -> None:
        self.weights.release(names)

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        given = {name: self._on_device(value, network, name) for name, value in inputs.items()}
        outputs = [self.gpu.empty(t.shape, t.dtype) for t in network.outputs]
        arrays = given | self.weights.bind(network, n)
        arrays |= {t.name: array for t, array in zip(network.outputs, outputs, strict=True)}
        self.segments[network.name].enqueue({name: array.address for name, array in arrays.items()})
        self.weights.used(network, n)
        return cast(tuple[Array, ...], tuple(outputs))

    def settle(self) -> None:
        for segment in self.segments.values():
            segment.settle()

    def _on_device(self, value: Any, network: Network, name: str) -> DeviceArray:
        if isinstance(value, DeviceArray):
            return value
        dtype = next(t.dtype for t in network.inputs if t.name == name)
        return self.gpu.upload(np.asarray(value, np.dtype(dtype)))
