"""A GPU for tests without one, whose streams run late: when an event forces them, or at random moments.

So a read before a write, or a write before the last read, shows in the numbers. All memory is the host's, is
NaN before its first write and after it was freed, and is counted.
"""

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from weight_oracle import converted, int8_rows, plain, quantised, rotated

from trt_wan.engines.fp8 import quantise_rows
from trt_wan.runtime.device.gpu import DeviceArray
from trt_wan.runtime.weights.stored import BLOCKS


def at(address: int, size: int, kind: Any = np.uint8) -> NDArray[Any]:
    """`size` bytes of memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(kind)


class LateStream:
    handle = 7

    def __init__(self, gpu: "LateGpu", name: str) -> None:
        self.gpu, self.name = gpu, name
        self.queue = deque[Callable[[], object]]()
        self.done = self.asked = 0

    def enqueue(self, work: Callable[[], object]) -> None:
        with self.gpu.lock:
            self.queue.append(work)
            self.asked += 1
        self.gpu.something_happens()

    def record(self) -> Any:
        with self.gpu.lock:
            mark = self.asked
            return SimpleNamespace(sync=lambda: self.until(mark), of=self)

    def wait(self, event: Any) -> None:
        self.enqueue(event.sync)

    def sync(self) -> None:
        self.until(self.asked)

    def until(self, mark: int) -> None:
        with self.gpu.lock:
            while self.done < mark and self.queue:
                self.step()

    def step(self) -> None:
        work = self.queue.popleft()
        work()
        self.done += 1


class Memory:
    def __init__(self, gpu: "LateGpu", size: int) -> None:
        self.gpu, self.size = gpu, size
        self.whole = np.full(size + 256, 0xFF, np.uint8)
        self.address = self.handle = self.whole.ctypes.data + -self.whole.ctypes.data % 256
        self.bytes = at(self.address, size)
        gpu.live.append(self)
        gpu.kept.append(self)
        self.event: Any = None

    def close(self, stream: LateStream | None = None) -> None:
        self.gpu.live.remove(self)
        if stream is None:
            self.bytes[:] = 0xFF
        else:
            self.gpu.leaving += 1
            stream.enqueue(self._free)

    def _free(self) -> None:
        self.bytes.fill(0xFF)
        self.gpu.leaving -= 1

    def used_by(self, stream: LateStream) -> None:
        assert self.event is None, "pinned memory is written while a copy reads it"
        self.event = stream.record()

    def wait(self) -> None:
        if self.event is not None:
            self.event.sync()
            self.event = None


class LateConverter:
    """The arithmetic of convert.cu by numpy."""

    def convert(
        self, stream: Any, encodings: Any, addresses: tuple[int, int, int], rows: int, inner: int
    ) -> None:
        stored, scales, target = addresses

        def work() -> None:
            values, factors = self._numbers(encodings[0], stored, scales, rows, inner)
            result = converted(values, factors, np.dtype(encodings[1]))
            at(target, result.nbytes)[:] = np.ascontiguousarray(result).reshape(-1).view(np.uint8)

        stream.enqueue(work)

    def quantise(
        self, stream: Any, encoding: str, addresses: tuple[int, int, int, int], rows: int, inner: int
    ) -> None:
        stored, scales, target, out_scales = addresses

        def work() -> None:
            made, factors = quantised(*self._numbers(encoding, stored, scales, rows, inner))
            at(target, rows * inner)[:] = made.reshape(-1).view(np.uint8)
            at(out_scales, 4 * rows, np.float32)[:] = factors

        stream.enqueue(work)

    def rotate(self, stream: Any, values: int, numbers: int, group: int) -> None:
        def work() -> None:
            there = at(values, 4 * numbers, np.float32)
            there[:] = rotated(there, group)

        stream.enqueue(work)

    def quantise_int8(
        self, stream: Any, values: int, target: int, scales: int, rows: int, inner: int
    ) -> None:
        def work() -> None:
            turned = at(values, 4 * rows * inner, np.float32).reshape(rows, inner)
            made, factors = int8_rows(turned)
            at(target, rows * inner)[:] = made.reshape(-1).view(np.uint8)
            at(scales, 4 * rows, np.float32)[:] = factors

        stream.enqueue(work)

    @staticmethod
    def _numbers(encoding: str, stored: int, scales: int, rows: int, inner: int) -> Any:
        factors = at(scales, 4 * rows, np.float32) if scales else None
        if encoding in BLOCKS:
            count, size = BLOCKS[encoding]
            return plain(at(stored, rows * inner // count * size).reshape(rows, -1), encoding), factors
        dtype = np.dtype(encoding)
        return at(stored, rows * inner * dtype.itemsize, dtype).reshape(rows, inner), factors


class LateMerger:
    """The arithmetic of merge.cu by numpy."""

    def add_product(self, stream: Any, dtype: Any, addresses: Any, scale: float, sizes: Any) -> None:
        (up, down, values), (rows, inner, rank) = addresses, sizes

        def work() -> None:
            first = at(up, rows * rank * dtype.itemsize, dtype).reshape(rows, rank).astype(np.float32)
            second = at(down, rank * inner * dtype.itemsize, dtype).reshape(rank, inner).astype(np.float32)
            there = at(values, 4 * rows * inner, np.float32).reshape(rows, inner)
            there += np.float32(scale) * (first @ second)

        stream.enqueue(work)

    def add(self, stream: Any, dtype: Any, change: int, scale: float, values: int, n: int) -> None:
        def work() -> None:
            there = at(values, 4 * n, np.float32)
            there += np.float32(scale) * at(change, n * dtype.itemsize, dtype).astype(np.float32)

        stream.enqueue(work)

    def quantise_rows(
        self, stream: Any, values: int, target: int, scales: int, rows: int, inner: int
    ) -> None:
        def work() -> None:
            made, factors = quantise_rows(at(values, 4 * rows * inner, np.float32).reshape(rows, inner))
            at(target, rows * inner)[:] = made.reshape(-1).view(np.uint8)
            at(scales, 4 * rows, np.float32)[:] = factors

        stream.enqueue(work)


class LateGpu:
    """`restless` is how likely something runs at each call; 0 does everything as late as possible."""

    def __init__(self, seed: int = 0, restless: float = 0.0) -> None:
        self.lock = threading.RLock()
        self.rng, self.restless = random.Random(seed), restless
        self.stream, self.copies, self.loads = (LateStream(self, n) for n in ("compute", "copies", "loads"))
        self.device = SimpleNamespace(set_current=lambda: None)
        self.live: list[Memory] = []
        self.leaving = 0  # pieces that were closed and are free only when the GPU gets there
        self.kept: list[Memory] = []  # so that no address comes twice
        self.reads = 0
        self.broken: dict[str, Exception] = {}  # by the name of a method

    def something_happens(self) -> None:
        with self.lock:
            if self.rng.random() < self.restless:
                stream = self.rng.choice((self.stream, self.copies, self.loads))
                stream.until(stream.done + self.rng.randint(1, 5))

    def allocate(self, size: int, stream: Any = None) -> Memory:
        self._break("allocate")
        memory = Memory(self, size)
        # Usable elsewhere only after the stream got there.
        (stream or self.stream).enqueue(lambda: memory.bytes.fill(0xFF))
        return memory

    def pinned(self, size: int) -> Memory:
        return Memory(self, size)

    def page_locked(self, size: int) -> Memory:
        self._break("page_locked")
        return Memory(self, size)

    def view(self, address: int, shape: Any, dtype: Any) -> DeviceArray:
        return DeviceArray(cast(Any, self), address, shape, dtype)

    def copy(self, target: int, source: int, size: int, stream: LateStream) -> None:
        self._break("copy")
        stream.enqueue(lambda: ctypes.memmove(target, source, size))

    def fill_random(
        self,
        array: DeviceArray,
        seed: int,
        mean: float,
        deviation: float,
        stream: LateStream,
        *,
        first: int = 0,
    ) -> None:
        def work() -> None:
            numbers = np.random.default_rng(seed).standard_normal(first + array.size, np.float32)
            values = numbers[first:].reshape(array.shape)
            made = (values * np.float32(deviation) + np.float32(mean)).clip(-448, 448).astype(array.dtype)
            at(array.address, array.nbytes)[:] = np.ascontiguousarray(made).reshape(-1).view(np.uint8)

        stream.enqueue(work)

    def once(self, key: Any, make: Any) -> Any:
        return {"weights": LateConverter, "merge": LateMerger}[key]()

    def _break(self, method: str) -> None:
        if method in self.broken:
            raise self.broken[method]
