"""Cuts a clip into overlapping windows, and chooses the decoded frames of each window that the output keeps.

Frames are numbered from 0 in the driving clip (n of them). A window has C frames and starts C - r after the
one before it; its first r frames repeat the last r of that one and are dropped from the output. Past its end
the clip is walked back and forth until the last window is full. The arithmetic is that of the official code
(model_spec.md 3.1) with two gaps closed: a clip of at most r frames gets one window (there: none), and a
single frame is repeated (there: an index error). `Plan` checks that C suits the VAE.
"""

from dataclasses import dataclass

from trt_wan.errors import UsageError, shown

TRAINED_OVERLAPS = (1, 5)  # carried frames the model was trained for


@dataclass(frozen=True)
class Windows:
    clip_frames: int
    window: int
    overlap: int

    def __post_init__(self) -> None:
        if self.clip_frames < 1:
            raise UsageError(
                f"A clip of {self.clip_frames} frames gives no video.",
                "Use a driving video, or a range of it, with at least one frame.",
            )
        if self.overlap < 1 or self.overlap % 4 != 1:
            near = max(1, (self.overlap - 1) // 4 * 4 + 1)
            raise UsageError(
                f"An overlap of {shown(self.overlap)} frames is not possible: it must be 4k+1.",
                f"Use --overlap {near} or --overlap {near + 4}; the model was trained with 1 and 5.",
            )
        if self.overlap >= self.window:
            raise UsageError(
                f"An overlap of {self.overlap} frames leaves nothing new in a window of {self.window}.",
                f"Use --window {self.overlap + 4} or more.",
            )

    @property
    def stride(self) -> int:
        """New frames per window."""
        return self.window - self.overlap

    @property
    def total(self) -> int:
        """Number of windows."""
        return max(1, -(-(self.clip_frames - self.overlap) // self.stride))

    @property
    def target(self) -> int:
        """Number of frames of the padded clip, with every window full."""
        return self.overlap + self.total * self.stride

    def indices(self, j: int) -> list[int]:
        """Returns the C frames of window j. The padded clip goes 0, 1, …, n-1, n-2, …, 0, 1, …"""
        start = self._start(j)
        return [self._bounce(frame) for frame in range(start, start + self.window)]

    def keep(self, j: int) -> slice:
        """Returns the decoded frames of window j that the output keeps: n in order over all windows."""
        start = self._start(j)
        return slice(self.overlap if j else 0, min(self.window, self.clip_frames - start))

    def _start(self, j: int) -> int:
        assert 0 <= j < self.total, f"there are {self.total} windows, asked for number {j}"
        return j * self.stride

    def _bounce(self, frame: int) -> int:
        last = self.clip_frames - 1
        if last == 0:
            return 0
        return last - abs(last - frame % (2 * last))
