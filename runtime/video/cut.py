"""`--start` and `--end`: the frames of a clip that are used.

A mark is a frame's number, from 0, or a time in seconds after the first frame, and stands for the first frame
that is not earlier. `end` is the first frame that is left out.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import InputError, UsageError, shown

# H:MM:SS.SSS, M:SS, 83.5, 83s. Digits are limited, for Fraction computes with all of them.
TIME = re.compile(r"(?:(?:(\d{1,3}):)?(\d{1,5}):)?(\d{1,7}(?:\.\d{1,9})?)s?", re.ASCII)
FRAME = re.compile(r"\d{1,9}", re.ASCII)
ROUNDING = 0.0005  # seconds by which containers round times


@dataclass(frozen=True)
class Mark:
    value: Fraction
    is_time: bool  # seconds; else a frame's number

    @staticmethod
    def of(text: str) -> "Mark":
        """From the command line. Raises UsageError."""
        if FRAME.fullmatch(text):
            return Mark(Fraction(text), False)
        if match := TIME.fullmatch(text):
            hours, minutes, seconds = (Fraction(part or 0) for part in match.groups())
            return Mark(hours * 3600 + minutes * 60 + seconds, True)
        raise UsageError(
            f"{shown(text)!r} is no frame and no time.",
            "Write a frame such as 120, or a time such as 5.5, 83s or 1:23.5.",
        )

    def __str__(self) -> str:
        return f"{float(self.value):g} s" if self.is_time else f"frame {self.value}"

    def frame(self, seconds: NDArray[np.float64]) -> int:
        """The first frame that is not earlier. `seconds` are the times of the frames, the first at 0."""
        if not self.is_time:
            return int(self.value)
        return int(np.searchsorted(seconds, float(self.value) - ROUNDING))


@dataclass(frozen=True)
class Cut:
    start: Mark | None = None
    end: Mark | None = None
    unless_one: bool = False  # a clip of one frame stands for all frames and is not cut

    def __post_init__(self) -> None:
        if self.start and self.end and self.start.is_time == self.end.is_time:
            if self.end.value <= self.start.value:
                raise UsageError(
                    f"The cut ends at {self.end} and starts at {self.start}: nothing is left.",
                    "Use an --end after --start: it is the first frame that is left out.",
                )

    @staticmethod
    def frames(used: range, to_the_end: bool) -> "Cut":
        """The frames `used`, for clips whose frames belong to those of another."""
        end = None if to_the_end else Mark(Fraction(used.stop), False)
        return Cut(Mark(Fraction(used.start), False), end)

    def of(self, path: Path, seconds: NDArray[np.float64]) -> range:
        """Numbers of the frames that are used. Raises InputError for a clip that ends before a mark."""
        count = len(seconds)
        if count == 1 and self.unless_one:
            return range(1)
        start = self.start.frame(seconds) if self.start else 0
        end = self.end.frame(seconds) if self.end else count
        for mark, beyond in ((self.start, start >= count), (self.end, self._is_after(seconds, end))):
            if mark and beyond:
                raise InputError(
                    f"{path} has {count} frames, the last at {float(seconds[-1]):.2f} s: no {mark}.",
                    "Give --start and --end within the clip, or leave them out.",
                )
        if end <= start:
            between = f"between {self.start} and {self.end}" if self.start else f"before {self.end}"
            raise InputError(f"No frame of {path} lies {between}.", "Use a later --end.")
        return range(start, end)

    def _is_after(self, seconds: NDArray[np.float64], end: int) -> bool:
        """Whether the end lies beyond the clip, by more than the last frame is shown."""
        if self.end is None or end < len(seconds):
            return False
        if not self.end.is_time:
            return end > len(seconds)
        shown = float(seconds[-1]) / max(len(seconds) - 1, 1)
        return float(self.end.value) > float(seconds[-1]) + shown + ROUNDING
