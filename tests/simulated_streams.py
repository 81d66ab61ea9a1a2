"""GPUs of several ranks in one process: memory is the host's, and streams are queues whose work is done in a
random order that keeps what streams and flags wait for. What is read too early or written too soon shows.

Every rank's program is a thread. A thread that waits for its GPU does the work of all of them.
"""

import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import late_peers
import numpy as np
from native_on_cpu import at

from trt_wan.runtime.device.gpu import DeviceArray

SECONDS = 60.0  # that nothing may take


class World:
    """All streams, and memory that is never given back."""

    def __init__(self, seed: int) -> None:
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._streams: list[Stream] = []
        self._memory: list[Any] = []

    def stream(self) -> "Stream":
        self._streams.append(Stream(self))
        return self._streams[-1]

    def memory(self, size: int) -> int:
        """The address of NaNs in every type."""
        block = np.full(size + 256, 0xFF, np.uint8)
        self._memory.append(block)
        return int(block.ctypes.data) + -int(block.ctypes.data) % 256

    def wait(self, event: Any) -> None:
        end = time.monotonic() + SECONDS
        while not event.done:
            with self._lock:
                ready = [stream for stream in self._streams if stream.queue and stream.queue[0][0]()]
                if ready and not event.done:
                    self._one_of(ready).queue.popleft()[1]()
            if not ready:
                time.sleep(0.001)  # another rank may enqueue more
                assert time.monotonic() < end, "the ranks wait for each other"

    def _one_of(self, ready: list["Stream"]) -> "Stream":
        """Some streams are a thousand times slower than others, and other ones after a while."""
        if self._random.random() < 0.01:
            for stream in self._streams:
                stream.pace = 10 ** self._random.uniform(-3, 0)
        return self._random.choices(ready, [stream.pace for stream in ready])[0]


class Stream(late_peers.Stream):
    handle = 0

    def __init__(self, world: World) -> None:
        super().__init__(deque())
        self.world, self.pace = world, 1.0

    def sync(self) -> None:
        self.world.wait(self.record())

    close = sync


class SimulatedGpu:
    """As far as GpuExecutor and the pipelines use a `Gpu`."""

    def __init__(self, world: World) -> None:
        self.world, self.stream = world, world.stream()
        self.device = SimpleNamespace(create_stream=world.stream)

    def allocate(self, size: int) -> Any:
        return SimpleNamespace(handle=self.world.memory(size), close=lambda stream: None)

    def sync(self) -> None:
        self.stream.sync()

    def copy(self, target: int, source: int, size: int, stream: Stream) -> None:
        stream.enqueue(lambda: ctypes.memmove(target, source, size))

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.view(self.world.memory(size), shape, dtype)

    def view(self, address: int, shape: Sequence[int], dtype: Any) -> DeviceArray:
        return DeviceArray(self, address, shape, dtype)  # type: ignore[arg-type]

    def upload(self, host: Any) -> DeviceArray:
        array = self.empty(host.shape, host.dtype)
        at(array.address, array.shape, array.dtype)[...] = host
        return array

    def download(self, array: DeviceArray, computed: Any = None) -> Any:
        self.world.wait(computed or self.stream.record())
        return at(array.address, tuple(array.shape), array.dtype).copy()


class SimulatedPeers:
    """The blocks and flags of all ranks; `of` is a rank's PeerMemory."""

    def __init__(self, world: World, count: int) -> None:
        self._world, self._count = world, count
        self._flags: list[list[int]] = []
        self._blocks: list[int] = []

    def connect(self, size: int, flags: int) -> None:
        if not self._blocks:
            self._blocks = [self._world.memory(size) for _ in range(self._count)]
            self._flags = [[0] * flags for _ in range(self._count)]

    def of(self, rank: int) -> Any:
        def signal(to: int, flag: int, value: int, stream: Stream) -> None:
            def work() -> None:
                assert value > self._flags[to][flag], "flags rise"
                self._flags[to][flag] = value

            stream.enqueue(work)

        def wait(flag: int, value: int, stream: Stream) -> None:
            stream.enqueue(lambda: None, lambda: self._flags[rank][flag] >= value)

        def close() -> None: ...

        return SimpleNamespace(address=self._blocks.__getitem__, signal=signal, wait=wait, close=close)


def together(programs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all ranks' programs, which run side by side. The first error is raised."""
    results: list[Any] = [None] * len(programs)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = programs[rank]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
