"""Hands out the bytes of one block of memory; needs no GPU.

First fit with joining of neighbours. All work on the block runs on one stream, in program order, so bytes
that were given back may be handed out again at once: their next user runs later.
"""

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trt_wan.errors import MemoryShort

ALIGNMENT = 256  # bytes; TensorRT asks it of every address


def laid_out(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of parts of one block, aligned, and the bytes of all together."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


@dataclass(frozen=True, order=True)
class Span:
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


class Arena:
    """`size` bytes to hand out; `peak` is the highest byte that was ever in use.

    `memory` is the block, where there is one: it lives as long as an array that has bytes of it.
    """

    def __init__(self, size: int, memory: Any = None) -> None:
        self.size, self.memory = size, memory
        self.peak = 0
        self.used = 0
        self._free = [Span(0, size)]  # sorted, never adjacent

    def take(self, size: int) -> Span:
        """A span of at least `size` bytes; MemoryShort if there is none."""
        size = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        for i, span in enumerate(self._free):
            if span.size >= size:
                taken = Span(span.start, size)
                rest = Span(taken.stop, span.size - size)
                self._free[i : i + 1] = [rest] if rest.size else []
                self.peak = max(self.peak, taken.stop)
                self.used += size
                return taken
        raise MemoryShort(
            f"{size / 1e9:.2f} GB more are needed than the {self.size / 1e9:.2f} GB planned for activations.",
            "This is a fault of the plan: please report it with the size, window and precision.",
        )

    def give(self, span: Span) -> None:
        self.used -= span.size
        insort(self._free, span)
        i = self._free.index(span)
        if i + 1 < len(self._free) and span.stop == self._free[i + 1].start:
            span = Span(span.start, span.size + self._free.pop(i + 1).size)
            self._free[i] = span
        if i and self._free[i - 1].stop == span.start:
            self._free[i - 1 : i + 1] = [Span(self._free[i - 1].start, self._free[i - 1].size + span.size)]
