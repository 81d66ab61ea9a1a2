"""Weights on the GPU: resident, or finished once and streamed from page-locked memory every step.

A thread loads packs ahead of their use, in the order in which a job first uses them (loader.py). A pack that
is bound and not loaded yet goes first. Packs of `passing` networks are freed after their use.
"""

import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from trt_wan.engines.contract import Network
from trt_wan.errors import MemoryShort, TrtWanError
from trt_wan.runtime.device.arena import ALIGNMENT
from trt_wan.runtime.device.checked import cuda_core
from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.device.pinned import PageLocked, require_host_memory
from trt_wan.runtime.weights.loader import Held, Loader
from trt_wan.runtime.weights.pack import Key, Pack
from trt_wan.runtime.weights.sources import Piece, Place, WeightSource
from trt_wan.runtime.weights.streaming import Streaming

AHEAD = 2  # packs of passing networks that may be loaded before their use
LEAVING = 1  # freed packs of passing networks that the GPU may still use
LOCKERS = 4  # threads that page-lock memory: each pack is touched by one of them


class DeviceWeights:
    """`bind` and `used` belong to one thread, the one that enqueues."""

    def __init__(self, gpu: Gpu, source: WeightSource) -> None:
        self.gpu, self.source = gpu, source
        self.passing: frozenset[str] = frozenset()
        self._resident: dict[Key, Held] = {}
        self._made: dict[Key, Held] = {}  # finished in page-locked memory, or under way there
        self._memory: dict[Key, Future[PageLocked]] = {}
        self._streamed: dict[Key, Pack] = {}
        self._streaming: Streaming | None = None
        self._scratch: Any = None  # where streamed packs are converted
        self._lockers: ThreadPoolExecutor | None = None
        self._changed = threading.Condition()
        self._urgent: deque[Held] = deque()
        self._queue: dict[Key, Pack] = {}
        self._room: int | None = None
        self._leaving: deque[Any] = deque()  # recorded after the last uses of freed packs
        self._spare: list[tuple[int, Any, Any]] = []  # bytes, buffer of a passing pack, event after its use
        self._thread: threading.Thread | None = None
        self._running = False
        self._loader = Loader(gpu, self._take, self._begin, self._finish)

    # ---- for the job ----

    def plan(self, streamed: Sequence[Pack], passing: Collection[str] = ()) -> None:
        """Sets the packs that stream from now on, in the order of a step, and the networks whose packs are
        freed after each use. Call between jobs.

        Packs that are loaded move to page-locked memory and back without being read again. Raises MemoryShort
        and changes nothing if host memory is short.
        """
        wanted = {pack.key: pack for pack in streamed}
        self._idle()
        new = [pack for pack in streamed if pack.key not in self._memory]
        if new:
            require_host_memory(sum(pack.size for pack in new))
        begun, self.passing = frozenset(passing) - self.passing, frozenset(passing)
        self._forget([key for key in self._resident if key[0] in begun])
        if list(wanted) == list(self._streamed):
            return
        self._drop_streaming()
        self._streamed = wanted
        for key in [key for key in self._memory if key not in wanted and key not in self._made]:
            _unlock(self._memory.pop(key))
        for pack in new:
            self._memory[pack.key] = self._lock(pack)
        for pack in new:
            if pack.key in self._resident:
                self._move_down(pack)
        if streamed:
            self._streaming = Streaming(self.gpu, list(streamed), self._finished)

    def change(self, source: WeightSource, keys: Collection[Key]) -> None:
        """Takes weights from `source` from now on; it differs from the source before in the packs `keys`,
        which are made anew when they are next used or prefetched. Call between jobs.

        Streamed packs keep their page-locked memory.
        """
        self._idle()
        self.source = source
        self._forget([key for key in self._resident if key in keys])
        if self._streaming is not None:
            self._streaming.forget()
        stale = [key for key in self._made if key in keys]
        if stale:
            with cuda_core():
                self.gpu.loads.sync()  # their copies into page-locked memory
        for key in stale:
            del self._made[key]
            if key not in self._streamed:  # it was going to be resident, by a copy out of this memory
                _unlock(self._memory.pop(key))

    def prefetch(self, packs: Sequence[Pack], room: int | None = None) -> None:
        """Loads packs ahead of `bind`, in the order in which the coming job first uses them.

        At most AHEAD packs of passing networks wait loaded for their use. Other packs go on being loaded
        meanwhile, until resident packs, AHEAD passing ones and those that the GPU still uses would take more
        than `room` bytes.
        """
        wanted = {pack.key for pack in packs}
        with self._changed:
            self._queue = {}  # before anything is freed, or the loader would take the next of the old queue
            stale = [key for key in self._resident if key[0] in self.passing and key not in wanted]
        self._forget(stale)
        with self._changed:
            self._room = room
            self._queue = {pack.key: pack for pack in packs if pack.key not in self._table(pack.key)}
            self._wake()

    def bind(self, network: Network, n: int) -> dict[str, DeviceArray]:
        """The weights, for work that is enqueued next on the compute stream. Raises the errors of loading."""
        key = network.name, n
        if key in self._streamed:
            assert self._streaming is not None
            return self._streaming.bind(key)
        held = self._resident.get(key)
        if held is None or not held.joined:
            held = self._waited(Pack.of(network, n) if held is None else held.pack)
            self._join(held)
        return held.arrays

    def used(self, network: Network, n: int) -> None:
        """Call after everything that reads the weights has been enqueued."""
        key = network.name, n
        if key in self._streamed:
            assert self._streaming is not None
            self._streaming.used(key)
        elif network.name in self.passing:
            self._forget([key], spare=True)
            # Memory is free when the GPU gets there: a host that runs ahead would have it all in use at once.
            self._leaving.append(self.gpu.stream.record())
            if len(self._leaving) > LEAVING:
                with cuda_core():
                    self._leaving.popleft().sync()

    def release(self, names: Collection[str]) -> None:
        """Frees the resident packs of some networks after all enqueued work, and loads no more of them."""
        with self._changed:
            self._queue = {key: pack for key, pack in self._queue.items() if key[0] not in names}
            loaded = [key for key in self._resident if key[0] in names]
        self._forget(loaded)

    def close(self) -> None:
        """Ends the threads and frees everything. The object can be used again afterwards."""
        self._idle()
        for stream in (self.gpu.loads, self.gpu.copies, self.gpu.stream):
            with suppress(
                Exception
            ):  # after a GPU fault everything fails, and the rest is freed all the same
                stream.sync()
        with suppress(Exception):
            self._drop_streaming()
        with suppress(Exception):
            self._forget(list(self._resident))
            self._drop_spare()
        self._streamed, self._resident = {}, {}
        self._leaving.clear()
        if self._lockers is not None:
            self._lockers.shutdown()
            self._lockers = None
        self._made.clear()
        for future in self._memory.values():
            with suppress(TrtWanError):
                _unlock(future)
        self._memory.clear()
        self._loader.close()

    @property
    def resident_bytes(self) -> int:
        return sum(held.pack.size for held in list(self._resident.values()) if held.error is None)

    @property
    def pinned_bytes(self) -> int:
        done = [memory for memory in list(self._memory.values()) if memory.done() and not memory.cancelled()]
        return sum(memory.result().size for memory in done if memory.exception() is None)

    @property
    def loaded_bytes(self) -> int:
        """Bytes read from files so far."""
        return self._loader.loaded_bytes

    @property
    def loading_seconds(self) -> float:
        """Seconds during which the loader had work."""
        return self._loader.seconds

    # ---- requests ----

    def _table(self, key: Key) -> dict[Key, Held]:
        return self._made if key in self._streamed else self._resident

    def _waited(self, pack: Pack) -> Held:
        """Returns the pack when all that writes it is enqueued. A pack that is not under way goes first."""
        table = self._table(pack.key)
        with self._changed:
            known = table.get(pack.key)
            short = known is not None and known.done.is_set() and isinstance(known.error, MemoryShort)
            if known is None or short:  # it was short ahead of its use: there may be room now
                self._queue.pop(pack.key, None)
                self._urgent.append(self._new(pack))
                self._wake()
            held = table[pack.key]
        try:
            held.wait()
        except BaseException:
            if held.done.is_set():
                with self._changed:
                    table.pop(pack.key, None)  # asked for again, it is loaded again
            raise
        return held

    def _finished(self, pack: Pack, wait: bool) -> Held | None:
        held = self._made.get(pack.key)
        if held is not None and held.done.is_set() and held.error is None:
            return held
        return self._waited(pack) if wait else None

    def _new(self, pack: Pack) -> Held:
        held = Held(pack, self._memory[pack.key] if pack.key in self._streamed else None)
        self._table(pack.key)[pack.key] = held
        return held

    def _wake(self) -> None:
        if not self._running and (self._urgent or self._queue):
            self._thread, self._running = self._loader.start(), True
        self._changed.notify_all()

    def _join(self, held: Held) -> None:
        if not held.joined:
            self.gpu.stream.wait(held.event)
            held.joined = True

    def _forget(self, keys: Sequence[Key], spare: bool = False) -> None:
        """Frees resident packs after all work enqueued on the compute stream. With `spare` their memory is
        for the next packs of the queue that pass and have that size: a fast loader had taken 8 GB more than
        these need, on an H200. (That CUDA's pool gave each new memory is a guess.)
        """
        for key in keys:
            held = self._resident.get(key)
            if held is None:
                continue
            held.done.wait()
            if held.buffer is not None:
                self._join(held)
                if spare:
                    with self._changed:
                        self._spare.append((_bytes(held.pack), held.buffer, self.gpu.stream.record()))
                else:
                    held.buffer.close(self.gpu.stream)
            with self._changed:
                del self._resident[key]
                self._drop_spare({_bytes(p) for p in self._queue.values() if p.key[0] in self.passing})
                self._changed.notify_all()

    def _drop_spare(self, needed: Collection[int] = ()) -> None:
        """Frees the memory of passing packs, but for buffers of the sizes that are needed."""
        for size, buffer, _ in self._spare:
            if size not in needed:
                buffer.close(self.gpu.stream)
        self._spare = [each for each in self._spare if each[0] in needed]

    def _buffer(self, pack: Pack) -> Any:
        """Memory that `loads` may write."""
        size = _bytes(pack)
        with self._changed:
            found = next((each for each in self._spare if each[0] == size), None)
            if found is not None:
                self._spare.remove(found)
        if found is None:
            return self.gpu.allocate(size, self.gpu.loads)
        self.gpu.loads.wait(found[2])
        return found[1]

    def _idle(self) -> None:
        """Empties the queue and waits until the loader has ended."""
        with self._changed:
            self._queue = {}
            self._drop_spare()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # ---- the loader's thread ----

    def _take(self, wait: bool) -> Held | None:
        with self._changed:
            while True:
                held = self._next()
                if held is not None:
                    return held
                if not wait:
                    return None
                if not self._queue:
                    self._running = False
                    return None
                self._changed.wait()

    def _next(self) -> Held | None:
        """The pack to load now: one that is waited for, or the first of the queue that may be loaded."""
        if self._urgent:
            return self._urgent.popleft()
        loaded = [held.pack.size for key, held in self._resident.items() if key[0] in self.passing]
        waiting = [pack.size for key, pack in self._queue.items() if key[0] in self.passing]
        room = self._room if self._room is not None and (waiting or loaded) else 1 << 62
        room -= self.resident_bytes
        reserved = max(0, (AHEAD + LEAVING + 1) * max(waiting, default=0) - sum(loaded))
        for key, pack in self._queue.items():
            if key in self._streamed:
                fits = True
            elif key[0] in self.passing:
                fits = not loaded or (len(loaded) < AHEAD and pack.size <= room)
            else:
                fits = pack.size + reserved <= room
            if fits:
                del self._queue[key]
                return self._new(pack)
        return None

    def _begin(self, held: Held) -> Iterator[Piece]:
        pack = held.pack
        if held.memory is not None:
            if self._scratch is None:
                largest = max(pack.size for pack in self._streamed.values())
                self._scratch = self.gpu.allocate(largest, self.gpu.loads)
            held.address = int(self._scratch.handle)
            return self.source.pieces(pack)
        held.buffer = self._buffer(pack)
        held.address = int(held.buffer.handle)
        held.arrays = pack.arrays(self.gpu, held.address)
        made = self._made.get(pack.key)
        if made is not None and made.done.is_set() and made.error is None:
            return iter([_MovedUp(made)])
        return self.source.pieces(pack)

    def _finish(self, held: Held) -> None:
        try:
            if held.error is None and held.memory is not None:
                self.gpu.copy(held.memory.result().address, held.address, held.pack.size, self.gpu.loads)
            if held.error is None:
                held.event = self.gpu.loads.record()
            if held.memory is None and held.pack.key in self._made and held.error is None:
                with cuda_core():
                    held.event.sync()
                del self._made[held.pack.key]
                _unlock(self._memory.pop(held.pack.key))
        except BaseException as error:
            held.error = error
        if held.error is not None and held.buffer is not None:
            with suppress(Exception):
                held.buffer.close(self.gpu.loads)
            held.buffer = None
        with self._changed:
            held.done.set()
            self._changed.notify_all()

    # ---- page-locked memory ----

    def _lock(self, pack: Pack) -> "Future[PageLocked]":
        if self._lockers is None:
            self._lockers = ThreadPoolExecutor(LOCKERS, "page-lock", self.gpu.device.set_current)
        return self._lockers.submit(self.gpu.page_locked, pack.size)

    def _move_down(self, pack: Pack) -> None:
        """From the device to page-locked memory. The loader is idle."""
        held = self._resident[pack.key]
        if held.error is None:
            memory = self._memory[pack.key]
            moved = Held(pack, memory)
            self.gpu.loads.wait(self.gpu.stream.record())  # a kernel may still read it
            self.gpu.copy(memory.result().address, held.address, pack.size, self.gpu.loads)
            moved.event = self.gpu.loads.record()
            moved.done.set()
            self._made[pack.key] = moved
            held.buffer.close(self.gpu.loads)
        del self._resident[pack.key]

    def _drop_streaming(self) -> None:
        if self._streaming is not None:
            self._streaming.close()
        if self._scratch is not None:
            self._scratch.close(self.gpu.loads)
        self._streaming = self._scratch = None


class _MovedUp:
    """A pack that streamed and is to be resident: one copy out of page-locked memory."""

    size = 0

    def __init__(self, made: Held) -> None:
        self.made = made

    def read(self, slot: Any) -> None:
        raise AssertionError("nothing is read")

    def enqueue(self, place: Place) -> None:
        assert self.made.memory is not None
        source = self.made.memory.result().address
        place.gpu.copy(place.pack, source, self.made.pack.size, place.gpu.loads)


def _bytes(pack: Pack) -> int:
    return max(pack.size, ALIGNMENT)


def _unlock(memory: "Future[PageLocked]") -> None:
    if not memory.cancel() and memory.exception() is None:
        memory.result().close()
