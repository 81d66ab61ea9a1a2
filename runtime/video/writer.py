"""Writes the finished video: pictures one at a time, and the sound of another file beside them.

Pictures are uint8 RGB [H, W, 3]. The file grows as `<stem>.partial<suffix>` and takes its final name only
when it is whole, so the final name never stands for half a video. Sound goes in as pictures do, up to the
same time: a job stopped half-way leaves a partial file that plays, with its sound.
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
from av.audio.stream import AudioStream
from av.codec.context import ThreadType
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray

from trt_wan.errors import InputError, OutputError, UsageError

CRF = 18  # x264: visually lossless
PRESET = "medium"
# x264's threads, from the picture alone, because its output depends on their number. Left alone, PyAV has
# x264 cut every picture into slices, by the CPUs it sees: another file on another machine, and threads that
# wait for each other at every picture. Whole pictures in parallel cost little as long as each is free to look
# far enough up and down. Sizes of two made-up clips of 480 lines, calm and very fast, against one thread: 4
# pictures +0 and +6 %, 5 +0 and +43 %, 8 -1 and +71 %; 7 slices +23 and +87 %.
LINES_PER_ENCODER, MOST_ENCODERS = 120, 8
# x264's macroblock tree reads memory that nobody wrote (seen with PyAV 18.1; not with asm=0): the same frames
# gave different files. It can come back when the test of that in test_video.py passes without this.
DETERMINISTIC = "mbtree=0"
# Until it is finished an mp4 is a row of fragments, one a second: what a killed job or a full disk leaves
# still plays.
FRAGMENTED = {"movflags": "+hybrid_fragmented", "frag_duration": "1000000"}
SOUND_BIT_RATE = 192_000  # of sound that has to be encoded again
PROBE = 65_536  # bytes written and dropped to see that a file can grow at all
# swscale's flags: bicubic chroma, exact rounding, chroma from every pixel (PyAV 17 names only the first).
SCALER = 0x4 | 0x40000 | 0x4000

# Sound that common players accept in each container; anything else is encoded again as AAC.
COPIED_SOUND = {
    ".mp4": frozenset({"aac", "ac3", "alac", "eac3", "mp3", "opus"}),
    ".mov": frozenset({"aac", "ac3", "alac", "eac3", "mp3"}),
    ".mkv": frozenset({"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus", "vorbis"}),
}
AAC_RATES = frozenset({8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000})


class VideoWriter:
    """A context manager. `finish()` makes the file; without it, what was written stays as partial file."""

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        rate: Fraction,
        sound: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        """Opens the partial file at once: what makes writing fail shows before hours of computing, not after.

        `sound` is a file whose first sound stream is taken, if it has one. Its picture's start is our time 0.
        """
        assert width % 2 == 0 and height % 2 == 0, f"4:2:0 needs even sizes, got {width}x{height}"
        self.path, self.overwrite = path, overwrite
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self.width, self.height, self.rate = width, height, rate
        self.frames = 0
        self._open = True
        self._scaler = VideoReformatter()
        self._container: OutputContainer | None = None
        self._sound: _Sound | None = None
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
        self._give_up()  # what broke the writing breaks the closing too
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
        # Not left to PyAV: it never closes a file whose header it could not write.
        self.partial.write_bytes(bytes(PROBE))
        options = {} if suffix == ".mkv" else FRAGMENTED
        # An absolute path, because ffmpeg takes `a:b.mp4` for a protocol called `a`.
        self._container = av.open(str(self.partial.absolute()), "w", options=options)
        self._video = self._container.add_stream("libx264", rate=self.rate)
        self._video.width, self._video.height, self._video.pix_fmt = self.width, self.height, "yuv420p"
        self._video.options = {"crf": str(CRF), "preset": PRESET, "x264-params": DETERMINISTIC}
        codec = self._video.codec_context
        codec.thread_type, codec.thread_count = ThreadType.FRAME, encoders(self.height)
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        if sound is not None:
            self._sound = _Sound.of(sound, self._container, COPIED_SOUND[suffix])
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
        with suppress(av.FFmpegError, OSError):  # whatever reached the disk stays
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


class _Sound:
    """Packets for the output's sound stream, in order of time, given out as far as the pictures have come."""

    @classmethod
    def of(cls, path: Path, output: OutputContainer, copied: frozenset[str]) -> Self | None:
        """None where the file has no sound."""
        with _readable(path):
            source = av.open(str(path.absolute()), metadata_errors="ignore")
            if source.streams.audio:
                return cls(path, source, output, copied)
            source.close()
            return None

    def __init__(
        self, path: Path, source: InputContainer, output: OutputContainer, copied: frozenset[str]
    ) -> None:
        self.path, self._source = path, source
        self._input = source.streams.audio[0]
        self._zero = _start(source)
        codec = self._input.codec_context.codec.canonical_name
        if codec in copied:
            self._output: AudioStream = output.add_stream_from_template(self._input)
            packets = self._copied()
        else:
            rate = self._input.rate if self._input.rate in AAC_RATES else 48_000
            self._output = output.add_stream("aac", rate=rate, bit_rate=SOUND_BIT_RATE)
            self._output.codec_context.layout = "mono" if self._input.channels == 1 else "stereo"
            packets = self._encoded()
        self._packets = packets
        self._next = self._advance()

    def until(self, end: Fraction) -> "list[Packet[AudioStream]]":
        """The packets not handed out yet that start before `end`, in seconds."""
        packets = []
        while self._next is not None and _seconds(self._next) < end:
            packets.append(self._next)
            self._next = self._advance()
        return packets

    def close(self) -> None:
        self._source.close()

    def _advance(self) -> "Packet[AudioStream] | None":
        with _readable(self.path):
            return next(self._packets, None)

    def _copied(self) -> "Iterator[Packet[AudioStream]]":
        rate, size = self._input.codec_context.sample_rate, self._input.codec_context.frame_size
        for packet in self._source.demux(self._input):
            if packet.pts is None:
                continue
            shift = round(self._zero / packet.time_base)
            pts, duration = packet.pts - shift, packet.duration or 0
            whole = round(Fraction(size, rate) / packet.time_base) if rate else 0
            if (
                pts < 0 and duration > whole > 0
            ):  # mp4 stretches what starts before the picture: it ends as it did
                pts, duration = pts + duration - whole, whole
            packet.pts = packet.dts = pts
            packet.duration = duration
            # One packet from before the start stays: a codec whose packets overlap needs it for the next.
            if pts + 2 * duration > 0:
                packet.stream = self._output
                yield packet

    def _encoded(self) -> "Iterator[Packet[AudioStream]]":
        for frame in self._source.decode(self._input):
            if frame.pts is None or frame.time_base is None:
                continue
            frame.pts -= round(self._zero / frame.time_base)
            if frame.pts * frame.time_base + Fraction(frame.samples, frame.sample_rate) > 0:
                yield from self._output.encode(frame)
        yield from self._output.encode(None)


def _seconds(packet: "Packet[Any]") -> Fraction:
    assert packet.pts is not None
    return packet.pts * packet.time_base


def _start(source: InputContainer) -> Fraction:
    """The time of the first picture, or of the first sample where there are no pictures, in seconds."""
    for stream in source.streams.video:
        if stream.start_time is not None and stream.time_base is not None:
            return stream.start_time * stream.time_base
    return Fraction(source.start_time or 0, av.time_base)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        fixed = path.with_name(f"{path.stem}.fixed.mp4")
        raise InputError(
            f"The sound of {path} cannot be read ({error.strerror}).",
            "Encode it again: "
            f"ffmpeg -i {shlex.quote(str(path))} -c:v copy -c:a aac {shlex.quote(str(fixed))}",
        ) from error


def check_target(path: Path, overwrite: bool) -> None:
    """Raises UsageError or OutputError if a video cannot be written to `path`."""
    if path.suffix.lower() not in COPIED_SOUND:
        raise UsageError(
            f"{path} ends in {path.suffix or 'nothing'}, which is not a video that can be written.",
            f"Use one of: {', '.join(COPIED_SOUND)}.",
        )
    if not path.parent.is_dir():
        raise OutputError(
            f"There is no folder {path.parent}.", f"Make it: mkdir -p {shlex.quote(str(path.parent))}"
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", "Give the name of a file.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already.", "Choose another name, or allow it to be overwritten.")


def _output_error(path: Path, error: OSError | av.FFmpegError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free // 2**20
        return OutputError(
            f"The disk is full: {path} cannot be written ({free} MB are free in {path.parent}).",
            "Free some space, or write to another disk.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            f"The folder {path.parent} cannot be written to.", "Write to a folder of your own."
        )
    return OutputError(
        f"{path} cannot be written ({error.strerror}).", "Check the disk, or write to another one."
    )


def _cut_to_what_plays(path: Path) -> bool:
    """Cuts an unfinished mp4 or mov after its last whole fragment; False if it has none. An mkv plays uncut.

    A fragment is a box `moof` and a box `mdat`; a box starts with its length, 4 bytes big-endian, and its
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
    """Puts a file on the disk, past every cache. (Windows does so only to a file open for writing.)"""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
