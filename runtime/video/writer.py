"""Writes the finished video: pictures one at a time, and the sound of another file beside them.

Pictures are uint8 RGB [H, W, 3]. The file grows as `<stem>.partial<suffix>` and takes its final name when it
is complete, so a file with the final name is never half a video. Sound is written up to the time of the last
picture: a stopped job leaves a partial file that plays, with its sound.
"""

import errno
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.codec.context import ThreadType
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray

from trt_wan.errors import InputError, OutputError, UsageError, with_commands
from trt_wan.runtime.video.sound import COPIED_SOUND, Sound

CRF = 18  # x264: visually lossless
PRESET = "medium"
# x264's output depends on its number of threads, so the number is computed from the picture's height. By
# default PyAV has x264 cut every picture into one slice per CPU: files differ between machines, and threads
# wait for each other at every picture. Encoding whole pictures in parallel costs little while motion search
# can reach far enough up and down. File sizes of two made-up clips of 480 lines, calm and very fast, against
# one thread: 4 pictures +0 and +6 %, 5 +0 and +43 %, 8 -1 and +71 %, 7 slices +23 and +87 %.
LINES_PER_ENCODER, MOST_ENCODERS = 120, 8
# x264's macroblock tree reads uninitialised memory (seen with PyAV 18.1, not with asm=0): the same frames
# gave different files. Remove this option when the test for it in test_video.py passes without.
DETERMINISTIC = "mbtree=0"
# An unfinished mp4 is a row of fragments, one a second, so that the file of a killed job or on a full disk
# still plays.
FRAGMENTED = {"movflags": "+hybrid_fragmented", "frag_duration": "1000000"}
PROBE = 65_536  # bytes, written and dropped to test that the file can grow
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
        crf: int = CRF,
        preset: str = PRESET,
    ) -> None:
        """Opens the partial file at once, so that a target that cannot be written fails before the computing.

        The first sound stream of the file `sound` is used, if it has one. The start of its picture is time 0.
        """
        assert width % 2 == 0 and height % 2 == 0, f"4:2:0 needs even sizes, got {width}x{height}"
        self.path, self.overwrite = path, overwrite
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self.width, self.height, self.rate = width, height, rate
        self.frames = 0
        self._options: dict[str, object] = {"crf": str(crf), "preset": preset, "x264-params": DETERMINISTIC}
        self._open = True
        self._scaler = VideoReformatter()
        self._container: OutputContainer | None = None
        self._sound: Sound | None = None
        try:
            with self._explained():
                check_target(path, overwrite)
                self._start(sound)
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
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALER,
        )
        picture.pts, picture.time_base = self.frames, 1 / self.rate
        with self._explained():
            self._mux(self._video.encode(picture))
            self.frames += 1
            if self._sound is not None:
                self._mux(self._sound.until(self.frames / self.rate))

    def finish(self) -> Path:
        """Completes the file and gives it its final name."""
        assert self.frames, "finish() before the first frame"
        with self._explained():
            self._close()
            _sync(self.partial)
            if self.path.exists() and not self.overwrite:
                raise OutputError(
                    f"{self.path} appeared while its video was being made.",
                    f"The finished video is {self.partial}: rename it.",
                )
            os.replace(self.partial, self.path)
        return self.path

    def abandon(self, keep: bool) -> Path | None:
        """Stops. With `keep`, returns the partial file if there are pictures in it that play."""
        if not self._open:
            return None
        if keep and self.frames:
            with suppress(av.FFmpegError, OSError, InputError):
                self._close()
                return self.partial
        self._give_up()  # an error that broke the writing breaks the closing too
        with suppress(OSError):
            if keep and self.frames and _cut_to_what_plays(self.partial):
                return self.partial
            self.partial.unlink(missing_ok=True)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon(keep=True)

    def _start(self, sound: Path | None) -> None:
        suffix = self.path.suffix.lower()
        # PyAV never closes a file whose header it could not write, so the file is created here.
        self.partial.write_bytes(bytes(PROBE))
        options = {} if suffix == ".mkv" else FRAGMENTED
        # An absolute path, because ffmpeg takes `a:b.mp4` for a protocol called `a`.
        self._container = av.open(str(self.partial.absolute()), "w", options=options)
        self._video = self._container.add_stream("libx264", rate=self.rate)
        self._video.width, self._video.height, self._video.pix_fmt = self.width, self.height, "yuv420p"
        self._video.options = self._options
        codec = self._video.codec_context
        codec.thread_type, codec.thread_count = ThreadType.FRAME, encoders(self.height)
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        if sound is not None:
            self._sound = Sound.of(sound, self._container, COPIED_SOUND[suffix])
        # The header is written with the first packet: closing a fragmented mp4 that has a header and no
        # packets crashes ffmpeg 8.1.

    def _mux(self, packets: "list[Packet[Any]]") -> None:
        assert self._open and self._container is not None, "the writer is closed"
        self._container.mux(packets)

    def _close(self) -> None:
        assert self._open and self._container is not None, "the writer is closed"
        self._mux(self._video.encode(None))
        self._container.close()
        self._release()

    def _give_up(self) -> None:
        with suppress(av.FFmpegError, OSError):  # data that reached the disk stays
            if self._container is not None:
                self._container.close()
        self._release()

    def _release(self) -> None:
        self._open = False
        if self._sound is not None:
            self._sound.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            raise _output_error(self.path, error) from error


def encoders(height: int) -> int:
    """x264's threads for pictures of that height."""
    return min(max(height // LINES_PER_ENCODER, 1), MOST_ENCODERS)


def check_target(path: Path, overwrite: bool) -> None:
    """Raises UsageError or OutputError if a video cannot be written to `path`."""
    if path.suffix.lower() not in COPIED_SOUND:
        raise UsageError(
            f"{path} ends in {path.suffix or 'nothing'}, which is not a video that can be written.",
            f"Use one of: {', '.join(COPIED_SOUND)}.",
        )
    if not path.parent.is_dir():
        raise OutputError(
            f"There is no folder {path.parent}.",
            with_commands("Make it:", f"mkdir -p {shlex.quote(str(path.parent))}"),
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", "Give the name of a file.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already.", "Choose another name, or add -y to replace it.")


def _output_error(path: Path, error: OSError | av.FFmpegError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free // 2**20
        return OutputError(
            f"The disk is full: {path} cannot be written ({free} MB are free in {path.parent}).",
            "Free some space, or write to another disk.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            f"The folder {path.parent} cannot be written to.", "Choose a folder that you can write to."
        )
    return OutputError(
        f"{path} cannot be written ({error.strerror}).", "Check the disk, or write to another one."
    )


def _cut_to_what_plays(path: Path) -> bool:
    """Cuts an unfinished mp4 or mov after its last whole fragment. False if it has none. An mkv plays uncut.

    A fragment is a box `moof` and a box `mdat`. A box starts with its length, 4 bytes big-endian, and its
    type, 4 letters (ISO/IEC 14496-12, 4.2).
    """
    if path.suffix.lower() == ".mkv":
        return True
    size, position, end = path.stat().st_size, 0, 0
    fragmented = False
    with path.open("r+b") as file:
        while position + 8 <= size:
            file.seek(position)
            length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
            position += max(length, 8)
            fragmented = fragmented or kind == b"moof"
            if kind == b"mdat" and fragmented and position <= size:
                end = position
        if end:
            file.truncate(end)
    return end > 0


def _sync(path: Path) -> None:
    """Flushes a file to the disk. Windows does so only if it is open for writing."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
