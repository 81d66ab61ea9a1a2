"""Writes the finished video: pictures one at a time, and the sound of another file beside them.

Pictures are uint8 RGB [H, W, 3]. The file grows as `<stem>.partial<suffix>` and gets its final name when it
is complete, so a file with the final name is never half a video. Sound is written up to the time of the last
picture. Every settled part has an encoder of its own: it needs no packet of another one, a later process can
go on after it, and the next part is encoded beside it (part.py).
"""

import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from trt_wan.errors import OutputError
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.gif import write_gif
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.part import PARTS, WAITING, Part, Then
from trt_wan.runtime.video.sound import Sound
from trt_wan.runtime.video.target import check_target, explained, joining, partial_names, sync
from trt_wan.runtime.video.working_file import Settled, WorkingFile

DEFAULT_QUALITY = Quality()
# swscale's flags: bicubic chroma, exact rounding, chroma from every pixel (PyAV 17 names only the first).
SCALER = 0x4 | 0x40000 | 0x4000


class VideoWriter:
    """A context manager. `finish()` makes the final file. Without it the partial file stays.

    Pictures are encoded in other threads. `write`, `check`, `wait` and `finish` raise the errors of earlier
    pictures.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        rate: Fraction,
        sound: Path | None = None,
        overwrite: bool = False,
        quality: Quality = DEFAULT_QUALITY,
        sound_start: Fraction = Fraction(0),
        settled: Settled | None = None,
        comment: str = "",
        waiting: int = WAITING,
    ) -> None:
        """Creates the partial file at once: a target that cannot be written fails before the computing. With
        `settled`, goes on from there: all other arguments must be the same as those of the earlier writer.

        The first sound stream of the file `sound` is used, if it has one. Time 0 is `sound_start`
        seconds after the start of its picture.
        A GIF has none. `comment` is for the metadata, of the partial file too. At most `waiting` pictures
        wait for an encoder.
        """
        assert width % 2 == 0 and height % 2 == 0, f"4:2:0 needs even sizes, got {width}x{height}"
        self.path, self.overwrite = path, overwrite
        self.width, self.height, self.rate = width, height, rate
        self.frames = 0 if settled is None else settled.pictures
        self.kept = 0  # frames in the partial file after abandon()
        self._scaler, self._waiting = VideoReformatter(), waiting
        self._part: Part | None = None  # holds the pictures since the last settled one
        self._parts: list[Part] = []  # those that are not known to be on the disk, and the present one
        self._file: WorkingFile | None = None
        self._sound: Sound | None = None
        try:
            with explained(path):
                check_target(path, overwrite)
                self._start(sound, sound_start, quality, settled, comment)
        except BaseException:
            self.abandon(keep=False)
            raise

    @property
    def has_sound(self) -> bool:
        return self._sound is not None

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Adds one picture [H, W, 3]."""
        assert frame.dtype == np.uint8 and frame.shape == (self.height, self.width, 3), (
            f"{frame.dtype} {frame.shape}"
        )
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = self._scaler.reformat(
            picture,
            format=self._encoding.pixels,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALER,
        )
        picture.pts, picture.time_base = self.frames, 1 / self.rate
        with explained(self.path):
            self.check()
            part = self._present()
            self.frames += 1
            part.put(picture, self._sound.until(self.frames / self.rate) if self._sound is not None else [])

    def settle(self, then: Then | None = None) -> None:
        """Ends a part: when every picture so far is on the disk, a thread calls `then`. It plays there even
        if this process is killed, and `settled` goes on after it. The next picture begins anew with a key
        frame, without waiting for these.
        """
        with explained(self.path):
            self._present().end(then)
            self._part = None

    def check(self) -> None:
        """Raises the errors of earlier pictures, for callers that take long to make the next."""
        with explained(self.path):
            for part in self._parts:
                part.check()

    def wait(self) -> None:
        """Ends a part and waits until every picture so far is on the disk."""
        if self._part is not None:
            self.settle()
        for part in reversed(self._parts):
            part.join()
        self.check()
        self._parts.clear()

    def finish(self) -> Path:
        """Completes the file and gives it its final name."""
        assert self.frames, "finish() before the first frame"
        self.wait()
        with explained(self.path):
            joined = self._joined()
            if KINDS[self.path.suffix.lower()].is_gif:
                joined = write_gif(joined, self.rate, self.frames)
            if self.path.exists() and not self.overwrite:
                joined.unlink()
                raise OutputError(
                    f"{self.path} appeared while its video was being made.",
                    f"The finished video is {self.partial}: rename it.",
                )
            os.replace(joined, self.path.resolve())  # behind a link, the file
            self._release()
            self.partial.unlink()
        return self.path

    def abandon(self, keep: bool, at_once: bool = False) -> Path | None:
        """Stops. With `keep`, returns the partial file if there are pictures in it that play. `at_once`:
        without the pictures that wait for an encoder.
        """
        if self._file is None:
            self._release()
            return None
        for part in self._parts if at_once else ():
            part.drop()
        with suppress(Exception):  # the disk may be full, and the partial file plays as it is
            self.wait()
        self.kept = self._file.pictures if keep else 0
        self._release()
        if self.kept:
            return self.partial
        with suppress(OSError):
            self.partial.unlink()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon(keep=True)

    def _start(
        self,
        sound: Path | None,
        sound_start: Fraction,
        quality: Quality,
        settled: Settled | None,
        comment: str,
    ) -> None:
        kind = KINDS[self.path.suffix.lower()]
        self._encoding = quality.encoding(kind, self.width, self.height, self.rate)
        encoder = self._encoding.open()
        self._open = lambda: encoder  # for the first part
        if sound is not None and not kind.is_gif:
            self._sound = Sound.of(sound, kind, sound_start)
        if settled is not None:
            self.partial = next(partial_names(self.path)).with_name(settled.name)
            if self._sound is not None:
                self._sound.until(self.frames / self.rate)  # which the file has
            self._file = WorkingFile(self.partial, kind, self.rate, encoder, self._sound, settled, comment)
            return
        for partial in partial_names(self.path):
            with suppress(FileExistsError):  # kept from an earlier run
                self._file = WorkingFile(partial, kind, self.rate, encoder, self._sound, comment=comment)
                self.partial = partial
                break

    @property
    def _opened(self) -> WorkingFile:
        assert self._file is not None, "the writer is closed"
        return self._file

    def _present(self) -> Part:
        """The part of the next picture. Waits while too many are being encoded."""
        if self._part is None:
            if len(self._parts) == PARTS:
                self._parts[0].join()
                self.check()
                del self._parts[0]
            before = self._parts[-1] if self._parts else None
            self._part = Part(self._opened, self._open, self.frames, before, self._waiting)
            self._parts.append(self._part)
            self._open = self._encoding.open
        return self._part

    def _joined(self) -> Path:
        """A file beside the partial one that has all of it, as it will stay."""
        target = joining(self.partial)
        try:
            self._opened.join(target)
            sync(target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return target

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._sound is not None:
            self._sound.close()
        self._file = None
