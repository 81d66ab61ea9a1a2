"""Reads packs ahead of converting them: reader threads fill pinned memory, one thread enqueues in order.

    file --readers--> ring of pinned slots --loads--> staging --convert.cu--> (float32 -->) pack on the device

The loader's thread takes one job after the other and ends when there are none; a new request starts it again.
A failure is kept in its job and raised to the caller that waits for the pack.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.device.pinned import PageLocked
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.sources import FLOAT32_BYTES, SLOT_BYTES, Piece, Place

SLOTS = 8  # pinned memory takes a second per GB to get
READERS = min(SLOTS, os.cpu_count() or 1)


class Held:
    """A pack and the memory it is written to: a buffer on the device, or page-locked memory."""

    def __init__(self, pack: Pack, memory: "Future[PageLocked] | None" = None) -> None:
        self.pack, self.memory = pack, memory
        self.address = 0  # on the device, where the pieces of the pack are written
        self.buffer: Any = None
        self.arrays: dict[str, DeviceArray] = {}
        self.event: Any = None  # recorded on `gpu.loads` after the last write
        self.joined = False  # whether the compute stream waits for the event
        self.done = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Returns when everything that writes the pack is enqueued. Raises the error of loading it."""
        self.done.wait()
        if self.error is not None:
            raise self.error


Step = tuple[Held, Piece | None, Any, "Future[None] | None"]  # job, piece or its end, slot, reading


class Loader:
    """`take(wait)` returns the next job; with `wait` it returns None only to end the thread, which `start`
    starts again. `begin(held)` sets the job's address and returns its pieces, `finish` ends a job.
    """

    def __init__(
        self,
        gpu: Gpu,
        take: Callable[[bool], Held | None],
        begin: Callable[[Held], Iterator[Piece]],
        finish: Callable[[Held], None],
    ) -> None:
        self.gpu, self._take, self._begin, self._finish = gpu, take, begin, finish
        self.loaded_bytes, self.seconds = 0, 0.0
        self._slots: list[Any] = []
        self._turn = 0
        self._readers: ThreadPoolExecutor | None = None
        self._staging: Any = None
        self._float32: Any = None

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="weights", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Call when the thread has ended and the device is idle."""
        if self._readers is not None:
            self._readers.shutdown()
        for slot in self._slots:
            slot.close()
        for buffer in (self._staging, self._float32):
            if buffer is not None:
                buffer.close(self.gpu.loads)
        self._slots, self._staging, self._float32, self._readers = [], None, None, None

    def _run(self) -> None:
        self.gpu.device.set_current()
        ahead: deque[Step] = deque()
        job: Held | None = None
        pieces: Iterator[Piece] = iter(())
        began = 0.0
        while True:
            while len(ahead) < SLOTS:
                if job is None:
                    job = self._take(not ahead)
                    if job is None:
                        break
                    if not ahead:
                        began = time.perf_counter()
                    pieces = self._opened(job)
                piece = self._next(job, pieces)
                ahead.append((job, piece, *self._reading(job, piece)))
                job = job if piece is not None else None
            if not ahead:
                return
            self._enqueue(*ahead.popleft())
            if not ahead and job is None:
                self.seconds += time.perf_counter() - began

    def _opened(self, job: Held) -> Iterator[Piece]:
        try:
            return self._begin(job)
        except BaseException as error:
            job.error = error
            return iter(())

    def _next(self, job: Held, pieces: Iterator[Piece]) -> Piece | None:
        try:
            return None if job.error is not None else next(pieces, None)
        except BaseException as error:
            job.error = error
            return None

    def _reading(self, job: Held, piece: Piece | None) -> tuple[Any, "Future[None] | None"]:
        """Starts to read the piece into the slot that was used longest ago."""
        if piece is None or not piece.size:
            return None, None
        try:
            slot = self._slot()
        except BaseException as error:
            job.error = error
            return None, None
        assert self._readers is not None
        return slot, self._readers.submit(_read, piece, slot)

    def _slot(self) -> Any:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS, "reader", self.gpu.device.set_current)
        if self._staging is None:
            self._staging = self.gpu.allocate(SLOT_BYTES, self.gpu.loads)
        if len(self._slots) < SLOTS:
            self._slots.append(self.gpu.pinned(SLOT_BYTES))
            return self._slots[-1]
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % SLOTS
        return slot

    def _float32_address(self) -> int:
        if self._float32 is None:
            self._float32 = self.gpu.allocate(FLOAT32_BYTES, self.gpu.loads)
        return int(self._float32.handle)

    def _enqueue(self, job: Held, piece: Piece | None, slot: Any, reading: "Future[None] | None") -> None:
        try:
            if reading is not None:
                reading.result()
            if piece is not None and job.error is None:
                staging = int(self._staging.handle) if self._staging is not None else 0
                address = slot.address if slot is not None else 0
                piece.enqueue(Place(self.gpu, address, staging, job.address, self._float32_address))
                self.loaded_bytes += piece.size
                if slot is not None:
                    slot.used_by(self.gpu.loads)
        except BaseException as error:
            job.error = job.error or error
        if piece is None:
            self._finish(job)


def _read(piece: Piece, slot: Any) -> None:
    slot.wait()  # for the copy that read it last
    piece.read(slot.bytes[: piece.size])
