"""Frames on their way from a live source to the model: which are kept, and which are dropped.

Time is counted in slots: slot k of a video of `rate` frames per second is its k-th frame. A source that is
faster than the model loses frames here, as evenly as can be, in two places:

- As they come, at the pace of the last windows: every second one if a window takes twice as long as its
  frames play.
- When a window takes its frames, from all that wait. Up to SLACK of a window may wait for the next one; if
  there are more, the window takes them all, thinned evenly, and none is left.

So a frame never waits longer than the window before its own takes, and SLACK.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median
from threading import Condition
from typing import TypeVar

from trt_wan.runtime.video.reader import Picture

SLACK = Fraction(1, 4)  # this share of a window's new frames may wait for the next window
MOST_WINDOWS = 2  # windows that may wait while one takes very long; then every second frame is dropped
RECENT = 4  # windows whose median time is the pace: an even number, so that times that alternate count half
EARLY = 0.25  # a frame may come this share of a slot before it, as times are rounded
POLL = 0.1  # seconds between looks for a signal, while frames are awaited
Pictures = Mapping[str, Picture]  # by the name of the clip: pose, face, background, mask
Item = TypeVar("Item")


@dataclass(frozen=True)
class Arrived:
    slot: int
    at: float  # seconds of the clock


@dataclass(frozen=True, eq=False)
class LiveFrame:
    arrived: Arrived
    pictures: Pictures


class Intake:
    """Between the threads of the source and of the preparation, and that of the model, which takes frames.

    Every admitted frame is `put`, in order, and after the last one `end` is called.
    """

    def __init__(
        self,
        rate: Fraction,
        window: int,
        overlap: int,
        window_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`window_seconds` is the time of a window, if it was measured already."""
        self.rate, self.clock = rate, clock
        self.frames_in = self.dropped = 0
        self.why_ended: str | None = None  # None: frames still come
        self._stride, self._most = window - overlap, MOST_WINDOWS * window
        self._windows = deque([] if window_seconds is None else [window_seconds], maxlen=RECENT)
        self._per_frame = 0.0  # seconds of preparation
        self._taken_at: float | None = None
        self._slot, self._due, self._every = -1, 0.0, 1.0
        self._ready: deque[LiveFrame] = deque()
        self._lacking = 0
        self._error: BaseException | None = None
        self._changed = Condition()
        self._every = self._slots_per_frame()

    def admit(self, seconds: float) -> Arrived | None:
        """None for a frame that is dropped. `seconds` is its time after the source's first frame. A source of
        more frames than `rate` has them left out, uncounted.
        """
        with self._changed:
            slot = math.floor(seconds * float(self.rate) + EARLY)
            if slot <= self._slot:
                return None
            self._slot = slot
            self.frames_in += 1
            if slot < self._due:
                self.dropped += 1
                return None
            self._due = max(self._due + self._every, slot + self._every - 1)
            return Arrived(slot, self.clock())

    def put(self, frame: LiveFrame) -> None:
        with self._changed:
            self._ready.append(frame)
            if len(self._ready) > self._most:
                kept = [*self._ready][::2]
                self._drop_for(kept)
                self._every *= 2  # until the model comes again
            self._changed.notify_all()

    def drop(self, count: int = 1) -> None:
        """Counts admitted frames that will not be put."""
        with self._changed:
            self.dropped += count

    def end(self, why: str, error: BaseException | None = None) -> None:
        """After the last frame. An `error` is raised to the model's thread when frames have run out."""
        with self._changed:
            self.why_ended, self._error = self.why_ended or why, self._error or error
            self._changed.notify_all()

    def prepared(self, seconds: float) -> None:
        """The time in which one frame was prepared lately."""
        with self._changed:
            self._per_frame = seconds

    @property
    def slot(self) -> int:
        """That of the last frame which came, admitted or dropped; -1 before the first."""
        with self._changed:
            return self._slot

    @property
    def lacking(self) -> int:
        """Frames that the model waits for now."""
        with self._changed:
            return self._lacking

    def take(self, count: int, look: Callable[[], None] = lambda: None) -> list[LiveFrame]:
        """The next `count` frames for a window; fewer, or none, at the end. Calls `look` while it waits."""
        with self._changed:
            if self._taken_at is not None:
                self._windows.append(self.clock() - self._taken_at)
            while (lacking := count - len(self._ready)) > 0 and self.why_ended is None:
                self._lacking = lacking
                self._changed.wait(POLL)
                look()
            self._lacking = 0
            if not self._ready and self._error is not None:
                raise self._error
            if len(self._ready) > count + SLACK * self._stride:
                self._drop_for(evenly([*self._ready], count))
            taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
            self._every, self._taken_at = self._slots_per_frame(), self.clock()
            return taken

    def _drop_for(self, kept: Sequence[LiveFrame]) -> None:
        self.dropped += len(self._ready) - len(kept)
        self._ready = deque(kept)

    def _slots_per_frame(self) -> float:
        """So that as many frames are kept while a window is computed as the next one takes. If the model is
        slower than the source, frames that wait already count among them.
        """
        rate = float(self.rate)
        slots = median(self._windows) * rate if self._windows else 0.0
        wanted = self._stride - (len(self._ready) if slots > self._stride else 0)
        return max(1.0, slots / max(wanted, 1), self._per_frame * rate)


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, with the first and the last where there are several."""
    if count == 1:
        return [items[0]]
    last = len(items) - 1
    return [items[round(k * last / (count - 1))] for k in range(count)]
