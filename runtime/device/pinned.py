"""Pinned memory in turn: what goes to the device is written into one slot while earlier ones are copied."""

from trt_wan.runtime.device.gpu import Pinned


class Ring:
    """`slots` pieces of `size` bytes. Whoever takes one writes it, enqueues its copy and calls `used_by`."""

    def __init__(self, slots: int, size: int) -> None:
        self.size = size
        self._slots = [Pinned(size) for _ in range(slots)]
        self._turn = -1

    def take(self) -> tuple[int, Pinned]:
        """The slot that was used longest ago, and which one it is. Waits for the slot's last copy, if that is
        not done: with enough slots it is.
        """
        self._turn = (self._turn + 1) % len(self._slots)
        slot = self._slots[self._turn]
        slot.wait()
        return self._turn, slot
