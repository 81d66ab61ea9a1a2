"""Writes the finished video: pictures one at a time, and the sound of another file beside them.

Pictures are uint8 RGB [H, W, 3]. The file grows as `<stem>.partial<suffix>` and gets its final name when it
is complete, so a file with the final name is never half a video. Sound is written up to the time of the last
picture. Every settled part has an encoder of its own: it needs no packet of another one, and a later process
can go on after it.
"""

import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from trt_wan.errors import OutputError
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.gif import write_gif
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.sound import Sound
from trt_wan.runtime.video.target import check_target, explained, joining, partial_names, sync
from trt_wan.runtime.video.working_file import Settled, WorkingFile

DEFAULT_QUALITY = Quality()
# swscale's flags: bicubic chroma, exact rounding, chroma from every pixel (PyAV 17 names only the first).
SCALER = 0x4 | 0x40000 | 0x4000


class VideoWriter:
    """A context manager. `finish()` makes the final file. Without it the partial file stays."""

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
    ) -> None:
        """Creates the partial file at once: a target that cannot be written fails before the computing. With
        `settled`, goes on from there: all other arguments must be the same as those of the earlier writer.

        The first sound stream of the file `sound` is used, if it has one. Time 0 is `sound_start`
        seconds after the start of its picture.
        A GIF has none. `comment` is for the metadata, of the partial file too.
        """
        assert width % 2 == 0 and height % 2 == 0, f"4:2:0 needs even sizes, got {width}x{height}"
        self.path, self.overwrite = path, overwrite
        self.width, self.height, self.rate = width, height, rate
        self.frames = 0 if settled is None else settled.pictures
        self.kept = 0  # frames in the partial file after abandon()
        self._scaler = VideoReformatter()
        self._coded: list[Packet[Any]] = []  # pictures that the file lacks, in decoding order
        self._heard: list[Packet[Any]] = []  # sound that the file lacks
        self._encoder: VideoStream | None = None  # of the pictures since the last settled one
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
            if self._encoder is None:
                self._encoder = self._encoding.open()
            self._coded += self._encoder.encode(picture)
            self.frames += 1
            if self._sound is not None:
                self._heard += self._sound.until(self.frames / self.rate)
            if len(self._coded) >= self.rate:  # a second
                self._append()

    def settle(self) -> Settled:
        """Writes every picture so far to the disk: it plays there even if this process is killed, and
        `settled` goes on after it. The next picture begins anew with a key frame.
        """
        with explained(self.path):
            self._drain()
            self._opened.append((), self._heard)
            self._heard = []
            self._opened.sync()
            return self._opened.settled()

    def finish(self) -> Path:
        """Completes the file and gives it its final name."""
        assert self.frames, "finish() before the first frame"
        with explained(self.path):
            self._drain()
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

    def abandon(self, keep: bool) -> Path | None:
        """Stops. With `keep`, returns the partial file if there are pictures in it that play."""
        if self._file is None:
            self._release()
            return None
        if keep and self.frames:
            with suppress(Exception):  # the disk may be full, and the partial file plays as it is
                self._drain()
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
        self._encoder = self._encoding.open()
        if sound is not None and not kind.is_gif:
            self._sound = Sound.of(sound, kind, sound_start)
        if settled is not None:
            self.partial = next(partial_names(self.path)).with_name(settled.name)
            if self._sound is not None:
                self._sound.until(self.frames / self.rate)  # which the file has
            self._file = WorkingFile(
                self.partial, kind, self.rate, self._encoder, self._sound, settled, comment
            )
            return
        for partial in partial_names(self.path):
            with suppress(FileExistsError):  # kept from an earlier run
                self._file = WorkingFile(
                    partial, kind, self.rate, self._encoder, self._sound, comment=comment
                )
                self.partial = partial
                break

    @property
    def _opened(self) -> WorkingFile:
        assert self._file is not None, "the writer is closed"
        return self._file

    def _append(self) -> None:
        """Writes the coded pictures, up to the first gap in display order, and the sound."""
        file = self._opened
        latest, ready = file.pictures - 1, 0
        for count, packet in enumerate(self._coded, 1):
            assert packet.pts is not None
            latest = max(latest, packet.pts)
            if latest == file.pictures + count - 1:
                ready = count
        if ready:
            file.append(self._coded[:ready], self._heard)
            self._coded, self._heard = self._coded[ready:], []

    def _drain(self) -> None:
        """The encoder's last packets go to the disk."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            self._coded += encoder.encode(None)
        self._append()
        self._opened.sync()

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
