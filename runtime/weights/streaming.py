"""Packs that stream: finished bytes in page-locked memory, copied into a few slots ahead of their use.

A step uses the packs in order and the next step begins again with the first. The order is an expectation: a
pack that was not expected, after a job that stopped in the middle of a step, is copied when it is asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any

from trt_wan.runtime.device.checked import cuda_core
from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.weights.loader import Held
from trt_wan.runtime.weights.pack import Key, Pack

SLOTS = 3  # device buffers of the largest pack: one in use, one on its way, one in which packs are converted


class Slot:
    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.position: int | None = None  # the pack that it holds
        self.arrived: Any = None  # recorded on `gpu.copies`


class Streaming:
    """`made(pack, wait)` returns the finished pack, or None if it is not finished and `wait` is false."""

    def __init__(self, gpu: Gpu, packs: Sequence[Pack], made: Callable[[Pack, bool], Held | None]) -> None:
        self.gpu, self._packs, self._made = gpu, packs, made
        self._position = {pack.key: i for i, pack in enumerate(packs)}
        largest = max(pack.size for pack in packs)
        count = min(SLOTS - 1, len(packs))
        self._slots = [Slot(gpu.allocate(largest)) for _ in range(count)]  # the last bound at the end

    def bind(self, key: Key) -> dict[str, DeviceArray]:
        position = self._position[key]
        slot = next((slot for slot in self._slots if slot.position == position), self._slots[0])
        if slot.position != position:
            held = self._made(self._packs[position], True)
            assert held is not None
            self._load(position, slot, held)
        self._slots.remove(slot)
        self._slots.append(slot)
        self.gpu.stream.wait(slot.arrived)
        return self._packs[position].arrays(self.gpu, int(slot.buffer.handle))

    def used(self, key: Key) -> None:
        """Starts the copies of the packs that come next."""
        position = self._position[key]
        wanted = [(position + i) % len(self._packs) for i in range(1, len(self._slots) + 1)]
        free = [slot for slot in self._slots if slot.position not in wanted]
        for target in wanted:
            if any(slot.position == target for slot in self._slots):
                continue
            held = self._made(self._packs[target], False)
            if held is None:
                return
            self._load(target, free.pop(), held)

    def forget(self) -> None:
        """Call when packs are going to be made anew. Waits for the copies under way out of their memory."""
        with cuda_core():
            self.gpu.copies.sync()
        for slot in self._slots:
            slot.position = None

    def close(self) -> None:
        """Waits for the copies under way: the page-locked memory that they read may be freed next."""
        with cuda_core():
            self.gpu.copies.sync()
        for slot in self._slots:
            slot.buffer.close(self.gpu.stream)

    def _load(self, position: int, slot: Slot, held: Held) -> None:
        """The copy waits for the last use of the slot, or its allocation, and for the pack to be finished."""
        assert held.memory is not None
        slot.position = None
        self.gpu.copies.wait(self.gpu.stream.record())
        self.gpu.copies.wait(held.event)
        source, size = held.memory.result().address, held.pack.size
        self.gpu.copy(int(slot.buffer.handle), source, size, self.gpu.copies)
        slot.arrived = self.gpu.copies.record()
        slot.position = position
