"""The memories and pointers of one object, and the choice of them for a frame (preprocess_spec.md B1.4).

Prompted frames are *conditioning* frames: they stay, and earlier frames see them too. The last six tracked
frames give a memory and the last fifteen a pointer. Nothing is computed here: memories are arrays of any
executor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trt_wan.engines.sam2.config import Sam2Config
from trt_wan.runtime.executors import Array

Pointer = Array  # [channels]


@dataclass(frozen=True)
class Remembered:
    memory: Array | None  # None: too old. The pointer is still used
    pointer: Pointer


@dataclass(frozen=True)
class View:
    """The memories for a frame, with their row of the temporal encoding, and the pointers, with their age
    relative to the oldest possible.
    """

    memories: list[tuple[Array, int]]
    pointers: list[tuple[Pointer, float]]


class MemoryBank:
    """`room` is the most memories of a track graph: if there are more, the conditioning frames nearest in
    time are used. With `chunk` everything is forgotten every `chunk` frames, as in the official
    preprocessing. `frames` is the clip's length, which matters for clips (and last chunks) shorter than 16.
    """

    def __init__(
        self, config: Sam2Config, room: int, chunk: int | None = None, frames: int | None = None
    ) -> None:
        self.recent = config.memory_frames - 1
        assert room > self.recent, f"room for {room} memories, {self.recent} are always recent ones"
        self.config, self.room, self.chunk, self.frames = config, room, chunk, frames
        self.prompted: dict[int, Remembered] = {}
        self.tracked: dict[int, Remembered] = {}

    def add_prompted(self, frame: int, memory: Array, pointer: Pointer) -> None:
        self.prompted[frame] = Remembered(memory, pointer)

    def add_tracked(self, frame: int, memory: Array, pointer: Pointer) -> None:
        """Also drops entries that no later frame can use, so that clips of any length fit."""
        self.tracked[frame] = Remembered(memory, pointer)
        for old in list(self.tracked):
            if frame - old >= self.config.max_pointers - 1:
                del self.tracked[old]
            elif frame - old >= self.recent:
                self.tracked[old] = Remembered(None, self.tracked[old].pointer)
        past = sorted(other for other in self.prompted if other <= frame)
        for old in past[: -self.room]:
            del self.prompted[old]

    def view(self, frame: int) -> View | None:
        """None if this frame can see no prompted frame yet."""
        start = frame // self.chunk * self.chunk if self.chunk else 0
        recent = [
            (memory, distance - 1)
            for distance in range(self.recent, 0, -1)
            if (memory := self._memory(frame - distance, start)) is not None
        ]
        conditioning = self._nearest(frame, start, self.room - len(recent))
        if not conditioning:
            return None
        memories = [(remembered.memory, self.recent) for _, remembered in conditioning]
        limit = self._pointer_limit(start)
        ages = [(r.pointer, float(frame - f)) for f, r in conditioning if f <= frame]
        ages += self._recent_pointers(frame, start, limit)
        seen = [(memory, row) for memory, row in memories if memory is not None]
        return View([*seen, *recent], [(pointer, age / max(1, limit - 1)) for pointer, age in ages])

    def _memory(self, frame: int, start: int) -> Array | None:
        return self.tracked[frame].memory if frame >= start and frame in self.tracked else None

    def _recent_pointers(self, frame: int, start: int, limit: int) -> Iterator[tuple[Pointer, float]]:
        for distance in range(1, limit):
            if frame - distance >= start and frame - distance in self.tracked:
                yield self.tracked[frame - distance].pointer, float(distance)

    def _pointer_limit(self, start: int) -> int:
        """One more than the usable pointers of tracked frames."""
        length = self.config.max_pointers if self.frames is None else self.frames - start
        return min(length, self.chunk or length, self.config.max_pointers)

    def _nearest(self, frame: int, start: int, count: int) -> list[tuple[int, Remembered]]:
        """The last prompted frame before, the first one at or after, then the nearest others."""
        end = start + self.chunk if self.chunk else None
        known = [f for f in sorted(self.prompted) if f >= start and (end is None or f < end)]
        before, after = [f for f in known if f < frame], [f for f in known if f >= frame]
        first = before[-1:] + after[:1]
        rest = sorted((f for f in known if f not in first), key=lambda f: abs(f - frame))
        return [(f, self.prompted[f]) for f in sorted((first + rest)[:count])]
