"""A clip whose frames come while it is read: those of a live source."""

from collections import deque
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.events import Note
from trt_wan.runtime.video.reader import Frames, Picture


class ArrivingClip(Frames):
    """Frames [H, W, 3] that `add` has been given; the last `history` of them can be read. `frames` of them
    have come so far.
    """

    has_sound = False
    times: NDArray[np.float64] | None = None  # see Clip
    start = Fraction(0)

    def __init__(self, path: Path, width: int, height: int, rate: Fraction, history: int) -> None:
        self.path, self.width, self.height, self.rate = path, width, height, rate
        self.frames, self.notes = 0, list[Note]()
        self._kept: deque[Picture] = deque(maxlen=history)

    @property
    def used(self) -> range:
        return range(self.frames)

    def add(self, picture: Picture) -> None:
        self._kept.append(picture)
        self.frames += 1

    def close(self) -> None:
        self._kept.clear()

    def _picture(self, index: int) -> Picture:
        oldest = self.frames - len(self._kept)
        assert oldest <= index < self.frames, f"frame {index} of {oldest} to {self.frames}"
        return self._kept[index - oldest]
