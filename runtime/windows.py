"""Cuts a clip into overlapping windows, and chooses the decoded frames of each window that the output keeps.

Frames are numbered from 0 in the driving clip (n of them). A window has C frames and starts C - r after the
one before it; its first r frames repeat the last r of that one and are dropped from the output. Past its end
the clip is walked back and forth until the last window is full. The arithmetic is that of the official code
(model_spec.md 3.1) with two gaps closed: a clip of at most r frames gets one window (there: none), and a
single frame is repeated (there: an index error). `Plan` checks that C suits the VAE.

With context windows C is no length that the model is built for, so the last window is cut to the 4k+1 frames
that are needed, at least `least`.

`whole_frames` is the frame plan of ComfyUI-WanVideoWrapper (compat "kijai", kijai_semantics.md 2.1): several
windows keep every frame, so that the video is longer than its clip, and the mask's tail is walked back and
forth by latents. Its faults are not copied: it skips frames at the seams unless C is 4k+1, its clips of one
frame fail, and a shorter clip makes a shorter window, for which no engine is built.
"""

from dataclasses import dataclass

from trt_wan.errors import UsageError, shown

TRAINED_OVERLAPS = (1, 5)  # carried frames the model was trained for


def rounded_up(frames: int) -> int:
    """The smallest 4k+1 from `frames` on."""
    return (frames + 2) // 4 * 4 + 1


def rounded_down(frames: int) -> int:
    """The largest 4k+1 up to `frames`."""
    return (frames - 1) // 4 * 4 + 1


@dataclass(frozen=True)
class Windows:
    clip_frames: int
    window: int
    overlap: int
    least: int | None = None  # frames of the last window; None: as many as the others have
    whole_frames: bool = False

    def __post_init__(self) -> None:
        if self.clip_frames < 1:
            raise UsageError(
                f"A clip of {self.clip_frames} frames gives no video.",
                "Use a driving video, or a range of it, with at least one frame.",
            )
        if self.overlap < 1 or self.overlap % 4 != 1:
            near = max(1, rounded_down(self.overlap))
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
        return self._start(self.total - 1) + self.length(self.total - 1)

    @property
    def kept_frames(self) -> int:
        """Number of frames of the output."""
        return self.target if self.whole_frames and self.total > 1 else self.clip_frames

    def length(self, j: int) -> int:
        """Frames of window j."""
        if self.least is None or j < self.total - 1:
            return self.window
        return max(self.least, rounded_up(self.clip_frames - self._start(j)))

    def indices(self, j: int) -> list[int]:
        """Returns the frames of window j. The padded clip goes 0, 1, …, n-1, n-2, …, 0, 1, …"""
        start = self._start(j)
        return [_bounce(frame, self.clip_frames) for frame in range(start, start + self.length(j))]

    def mask_indices(self, j: int) -> list[int]:
        """`indices` of the mask."""
        if not self.whole_frames:
            return self.indices(j)
        latents = (self.clip_frames - 1) // 4 + 1
        start = self._start(j) // 4
        first, *others = (_bounce(start + k, latents) for k in range((self.length(j) - 1) // 4 + 1))
        return [4 * first, *(max(4 * latent - 3 + k, 0) for latent in others for k in range(4))]

    def end(self, j: int) -> int:
        """The frames that a clip needs to fill window j."""
        return j * self.stride + self.window

    def keep(self, j: int) -> slice:
        """Returns the decoded frames of window j that the output keeps: all in order over all windows."""
        start = self._start(j)
        return slice(self.overlap if j else 0, min(self.length(j), self.kept_frames - start))

    def _start(self, j: int) -> int:
        assert 0 <= j < self.total, f"there are {self.total} windows, asked for number {j}"
        return j * self.stride


def _bounce(place: int, count: int) -> int:
    """Place `place` of 0, 1, …, count-1, count-2, …, 0, 1, …"""
    last = count - 1
    if last == 0:
        return 0
    return last - abs(last - place % (2 * last))
