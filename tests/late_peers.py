"""Ranks of a group without GPUs, in one process. Each rank enqueues all its work first, for its host never
waits. Then the streams of all ranks run in a random order, or one always before another, as far as events
and flags allow. So a read before a write, or a write before the last read, shows in the numbers.
"""

import ctypes
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from kernels_on_cpu import CpuKernels
from numpy.typing import NDArray

from trt_wan.runtime.device.arena import Arena
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.parallel.peer_memory import Pieces

Array = NDArray[Any]


def at(address: int, shape: tuple[int, ...], kind: Any) -> Array:
    """The memory itself, as an array."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(kind).reshape(shape)


class Stream:
    """`queue` may be one that several streams share, as streams may share a queue of the hardware."""

    def __init__(self, queue: deque[Any]) -> None:
        self.queue = queue

    def enqueue(self, work: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        self.queue.append((ready, work))

    def record(self) -> Any:
        event = SimpleNamespace(done=False)
        self.enqueue(lambda: setattr(event, "done", True))
        return event

    def wait(self, event: Any) -> None:
        self.enqueue(lambda: None, lambda: bool(event.done))


class Peers:
    """`one_queue`: a rank has one queue of the hardware. `blind`: no stream waits for a flag."""

    def __init__(
        self, kernels: CpuKernels, ranks: int, size: int, flags: int, *, one_queue: bool, blind: bool
    ) -> None:
        self.kernels, self.size, self.one_queue, self.blind = kernels, size, one_queue, blind
        self.blocks = [np.zeros(size + 256, np.uint8) for _ in range(ranks)]
        self.flags = np.zeros((ranks, flags), np.int64)
        self.queues: list[deque[Any]] = []

    def run(self, seed: int) -> None:
        """Runs all that is enqueued. Odd seeds: the first stream of a fixed order that can go on does."""
        rng = random.Random(seed)
        order = rng.sample(self.queues, len(self.queues))
        while any(order):
            able = [queue for queue in order if queue and queue[0][0]()]
            assert able, "deadlock"
            _, work = (able[0] if seed % 2 else rng.choice(able)).popleft()
            work()

    def stream(self, of_rank: deque[Any]) -> Stream:
        """A side stream, beside the queue of a rank's compute stream."""
        if self.one_queue:
            return Stream(of_rank)
        self.queues.append(deque())
        return Stream(self.queues[-1])


class LateGpu:
    """One rank's. Memory of the arena is handed out again at once, as in the real one."""

    empty, view = Gpu.empty, Gpu.view

    def __init__(self, peers: Peers, arena: int) -> None:
        self.stream = Stream(deque())
        peers.queues.append(self.stream.queue)
        self.device = SimpleNamespace(create_stream=lambda: peers.stream(self.stream.queue))
        memory = np.full(arena + 256, 0xFF, np.uint8)
        start = memory.ctypes.data + -memory.ctypes.data % 256
        self.arena = Arena(arena, SimpleNamespace(handle=start, memory=memory))

    def upload(self, host: Array) -> Any:
        array = Gpu.empty(self, host.shape, host.dtype)  # type: ignore[arg-type]
        self.write(array, host)
        return array

    def write(self, array: Any, host: Array) -> None:
        place, host = array.address, host.copy()
        self.stream.enqueue(lambda: np.copyto(at(place, host.shape, host.dtype), host))

    def allocate(self, size: int) -> Any:
        memory = np.full(size, 0xFF, np.uint8)
        return SimpleNamespace(handle=memory.ctypes.data, memory=memory)


class LateMemory:
    """PeerMemory of one rank."""

    def __init__(self, peers: Peers, rank: int, gpu: LateGpu) -> None:
        self._peers, self._rank, self._gpu, self.size = peers, rank, gpu, peers.size

    def address(self, rank: int) -> int:
        start = self._peers.blocks[rank].ctypes.data
        return start + -start % 256

    def copy(
        self, target: tuple[int, int], source: tuple[int, int], width: int, height: int, stream: Stream
    ) -> None:
        def work() -> None:
            for run in range(height):
                ctypes.memmove(target[0] + run * target[1], source[0] + run * source[1], width)

        stream.enqueue(work)

    def clear(self, target: tuple[int, int], width: int, height: int, stream: Stream) -> None:
        def work() -> None:
            for run in range(height):
                ctypes.memset(target[0] + run * target[1], 0, width)

        stream.enqueue(work)

    def lay_beside(self, out: int, address: int, pieces: Pieces) -> None:
        kernels, numbers = self._peers.kernels, pieces.numbers
        self._gpu.stream.enqueue(lambda: kernels.launch("beside", 3, 2, False, out, address, *numbers))

    def signal(self, rank: int, flag: int, value: int, stream: Stream) -> None:
        stream.enqueue(lambda: self._peers.flags.__setitem__((rank, flag), value))

    def wait(self, flag: int, value: int, stream: Stream) -> None:
        if not self._peers.blind:
            stream.enqueue(lambda: None, lambda: bool(self._peers.flags[self._rank, flag] >= value))
