"""Memory for batches on their way to the GPU and back, while other batches are computed.

A slot holds one batch from the upload until its results are on the host. Each slot has separate memory, so
the next batch can be uploaded while the GPU computes another slot's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu, copy
from trt_wan.runtime.device.pinned import Pinned

Array = NDArray[Any]
Shape = tuple[int, ...]
Part = tuple[int, Shape, np.dtype[Any]]  # address, shape and type of an array on the GPU

PIECE_BYTES, PIECES = 4 << 20, 4  # pinned memory: allocating takes 1 s per GB


class Sender:
    """Copies host arrays of any size to the GPU in pieces, on the stream for copies."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._pieces = [Pinned(PIECE_BYTES) for _ in range(PIECES)]

    def send(self, array: Array, address: int) -> None:
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, len(source), PIECE_BYTES):
            part = source[start : start + PIECE_BYTES]
            pinned = self._pieces.pop(0)  # the least recently used one
            self._pieces.append(pinned)
            pinned.wait()
            pinned.bytes[: len(part)] = part
            copy(address + start, pinned.address, len(part), self._gpu.copies)
            pinned.used_by(self._gpu.copies)

    def finish(self) -> None:
        """Work enqueued on the compute stream after this call sees the uploaded arrays."""
        self._gpu.stream.wait(self._gpu.copies.record())


class Room:
    """Device memory that grows on demand. It must not be in use when it grows."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._buffer: Any = None
        self._size = 0

    def of(self, size: int) -> int:
        if size > self._size:
            if self._buffer is not None:
                self._buffer.close(self._gpu.stream)
            self._buffer, self._size = None, 0
            self._buffer, self._size = self._gpu.allocate(size), size
            # The allocation is ordered on the compute stream: the copy stream must wait for it.
            self._gpu.copies.wait(self._gpu.stream.record())
        return int(self._buffer.handle)


class Flight:
    """A batch on its way."""

    def __init__(self, done: Any, read: Callable[[], list[Array]]) -> None:
        self._done, self._read = done, read
        self._results: list[Array] | None = None

    def wait(self) -> list[Array]:
        """The results as copies. The slot is free afterwards."""
        if self._results is None:
            self._done.sync()
            self._results = self._read()
        return self._results


class Slot:
    """`parts` are the shapes and types of the network's input and outputs, by name."""

    def __init__(self, gpu: Gpu, sender: Sender, parts: dict[str, tuple[Shape, np.dtype[Any]]]) -> None:
        self._gpu, self._sender = gpu, sender
        sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in parts.items()}
        self._buffers = {name: gpu.allocate(size) for name, size in sizes.items()}
        self.parts: dict[str, Part] = {
            name: (int(self._buffers[name].handle), *parts[name]) for name in parts
        }
        gpu.copies.wait(gpu.stream.record())
        self._sent, self._made = Room(gpu), Room(gpu)
        self._pinned: Any = None
        self.flight: Flight | None = None

    def send(self, arrays: Sequence[Array]) -> list[int]:
        """Returns the address of each array on the GPU, valid for work enqueued after this call."""
        offsets, size = laid_out({str(i): array.nbytes for i, array in enumerate(arrays)})
        start = self._sent.of(size)
        addresses = [start + offset for offset in offsets.values()]
        for array, address in zip(arrays, addresses, strict=True):
            self._sender.send(array, address)
        self._sender.finish()
        return addresses

    def send_to(self, address: int, array: Array) -> None:
        self._sender.send(array, address)
        self._sender.finish()

    def room(self, size: int) -> int:
        """The address of `size` bytes for results made from the network's outputs."""
        return self._made.of(size)

    def fetch(self, parts: Sequence[Part], settle: Callable[[], None]) -> Flight:
        """Enqueues the download of `parts`. `settle` is called when they have arrived."""
        sizes = {str(i): int(np.prod(shape)) * dtype.itemsize for i, (_, shape, dtype) in enumerate(parts)}
        offsets, size = laid_out(sizes)
        if self._pinned is None or len(self._pinned.bytes) < size:
            self._pinned = Pinned(size)
        pinned = self._pinned
        for name, (address, _, _) in zip(sizes, parts, strict=True):
            copy(pinned.address + offsets[name], address, sizes[name], self._gpu.stream)

        def read() -> list[Array]:
            settle()
            return [
                pinned.bytes[offsets[name] : offsets[name] + sizes[name]].view(dtype).reshape(shape).copy()
                for name, (_, shape, dtype) in zip(sizes, parts, strict=True)
            ]

        self.flight = Flight(self._gpu.stream.record(), read)
        return self.flight
