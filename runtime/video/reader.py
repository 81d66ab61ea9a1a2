"""Reads clips and pictures. Knows no people, no model's sizes and no resampling in time.

A frame is uint8 RGB [H, W, 3], turned upright, at the file's own size. Pixels count as square. Colours follow
the file's tags. An untagged clip is read as BT.601 limited range, as all readers built on swscale do.

Containers are often wrong about their length and rate, so both are measured in one pass over the packets when
a clip is opened, without decoding. Frames are then decoded in order, on request.
"""

import os
import shlex
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from trt_wan.errors import InputError, with_commands

Picture = NDArray[np.uint8]

# Seconds of sound against picture over the whole clip (ITU-R BT.1359 accepts -185 to +90 ms).
MAX_DRIFT = Fraction(1, 10)
# Seconds that a container may promise beyond its last packet: headers are rounded up.
MAX_SHORTFALL = Fraction(1)


class Clip:
    """An open video file. Frames come in forward order, and the last `history` of them can be read again.

    Kept frames stay in the decoder's own format: 1.5 bytes per pixel for a usual clip, half of RGB.
    Raises InputError for a file that cannot be used, on opening or, for damage further in, on reading.
    """

    path: Path
    width: int
    height: int
    frames: int
    rate: Fraction  # frames per second, the mean if frames are unevenly spaced
    has_sound: bool

    def __init__(self, path: Path, history: int = 1) -> None:
        assert history >= 1, f"history is {history}"
        self.path = path
        with _open(path) as container:
            self.frames, self.rate = _measure(container, path)
        self._container = _open(path)
        stream = _video_stream(self._container, path)
        stream.thread_type = "AUTO"
        self.has_sound = bool(self._container.streams.audio)
        self._coming = self._container.decode(stream)
        self._kept: deque[VideoFrame] = deque(maxlen=history)
        self._decoded = 0
        self._scaler = VideoReformatter()
        try:
            self._decode_next()
            self._coded_size = (self._kept[0].width, self._kept[0].height)
            self._turn = _turn(self._kept[0], path)
        except InputError:
            self.close()
            raise
        self.width, self.height = self._coded_size[::-1] if self._turn[0] else self._coded_size

    def window(self, indices: Sequence[int]) -> Picture:
        """Frames [n, H, W, 3] by number, in any order and with repeats, as far back as `history` reaches."""
        pictures = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        for picture, index in zip(pictures, indices, strict=True):
            picture[:] = self._picture(index)
        return pictures

    def close(self) -> None:
        self._container.close()
        self._kept.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _picture(self, index: int) -> Picture:
        assert 0 <= index < self.frames, f"frame {index} of {self.frames}"
        while self._decoded <= index:
            self._decode_next()
        oldest = self._decoded - len(self._kept)
        assert index >= oldest, (
            f"frame {index} is gone: {oldest} is the oldest kept (history {self._kept.maxlen})"
        )
        frame = self._kept[index - oldest]
        if (frame.width, frame.height) != self._coded_size:
            first = "x".join(map(str, self._coded_size))
            raise InputError(
                f"{self.path} changes its size at frame {index}: {first} to {frame.width}x{frame.height}.",
                with_commands("Make one size of it:", _remake(self.path)),
            )
        transpose, rows, columns = self._turn
        picture = np.asarray(self._scaler.reformat(frame, format="rgb24").to_ndarray(), np.uint8)
        picture = picture.transpose(1, 0, 2) if transpose else picture
        return picture[::rows, ::columns]

    def _decode_next(self) -> None:
        try:
            self._kept.append(next(self._coming))
        except StopIteration:
            raise InputError(
                f"{self.path} is damaged: of its {self.frames} frames only {self._decoded} can be decoded.",
                with_commands("Keep what can be read:", _remake(self.path)),
            ) from None
        except av.FFmpegError as error:
            raise InputError(
                f"{self.path} is damaged: it cannot be decoded after frame {self._decoded} of {self.frames} "
                f"({error.strerror}).",
                with_commands("Keep what can be read:", _remake(self.path)),
            ) from error
        self._decoded += 1


def read_picture(path: Path) -> Picture:
    """uint8 RGB [H, W, 3]: turned as its EXIF says, transparency dropped, grey as three equal channels."""
    _refuse_missing(path)
    fixed = shlex.quote(str(path.with_suffix(".fixed.png")))
    unreadable = InputError(
        f"{path} cannot be read as a picture.",
        with_commands("Convert it to PNG:", f"ffmpeg -i {shlex.quote(str(path))} -frames:v 1 {fixed}"),
    )
    try:
        # Unlike numpy, cv2.imread cannot open a path outside the code page on Windows.
        picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (cv2.error, OSError) as error:
        raise unreadable from error
    if picture is None:
        raise unreadable
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def _open(path: Path) -> InputContainer:
    _refuse_missing(path)
    try:
        # An absolute path, because ffmpeg takes `a:b.mp4` for a protocol called `a`.
        container = av.open(str(path.absolute()), metadata_errors="ignore")
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a video ({error.strerror}).",
            with_commands("If a player can show it, convert it:", _remake(path)),
        ) from error
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        container.close()
        raise InputError(f"{path} is a picture, not a video.", "Give a video file here, for example an .mp4.")
    return container


def _refuse_missing(path: Path) -> None:
    if not os.path.exists(path):  # unlike Path.exists, not an OSError for a name that is too long
        raise InputError(f"There is no file {path}.", "Check the path.")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file.", "Give the file itself.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes).", "Copy or download it again.")


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first video stream that is not the cover picture of a song."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise InputError(f"{path} has no video in it.", "Give a file with moving pictures.")


def _measure(container: InputContainer, path: Path) -> tuple[int, Fraction]:
    """Number and rate of the frames that are shown (an edit list hides some), from the packets alone."""
    video = _video_stream(container, path)
    count, end = 0, Fraction(0)
    times: list[int] = []  # frame times in units of the stream's time base
    try:
        for packet in container.demux():
            if packet.is_corrupt:
                raise _cut_short(path)
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index == video.index and packet.size and not packet.is_discard:
                count += 1
                times += [] if packet.pts is None else [packet.pts]
    except av.FFmpegError as error:
        raise _cut_short(path) from error
    if count == 0:
        raise InputError(f"{path} has no frames in it.", "Give a longer video.")
    if container.duration is not None:
        promised = Fraction((container.start_time or 0) + container.duration, av.time_base)
        if promised - end > MAX_SHORTFALL:
            raise _cut_short(path)
    span = (max(times) - min(times)) * video.time_base if times and video.time_base else Fraction(0)
    return count, _rate(video, count, span, path)


def _rate(video: VideoStream, count: int, span: Fraction, path: Path) -> Fraction:
    """The declared rate if it fits the timestamps (often rounded to ms), else the measured rate."""
    declared = video.average_rate or video.guessed_rate
    if declared and (not span or abs((count - 1) / declared - span) <= MAX_DRIFT):
        return Fraction(declared)
    if not span:
        raise InputError(
            f"{path} does not say how many frames it has per second.",
            with_commands("Say it:", _remake(path, "-r 30 ")),
        )
    return ((count - 1) / span).limit_denominator(1001)


def _turn(frame: VideoFrame, path: Path) -> tuple[bool, int, int]:
    """How to set the frame upright: whether to transpose it, then its steps (1, -1) along rows and columns.

    The display matrix is int32 [3, 3]: ((a, b), (c, d)) top left turns (x, y) into (a·x + c·y, b·x + d·y).
    PyAV's `rotation` is one angle and cannot tell a mirrored picture from a turned one.
    """
    side_data: Any = frame.side_data  # PyAV's stubs have motion vectors only
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 1, 1
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, "<i4")[:5])
    if a and d and not b and not c:
        return False, 1 if d > 0 else -1, 1 if a > 0 else -1
    if b and c and not a and not d:
        return True, 1 if b > 0 else -1, 1 if c > 0 else -1
    raise InputError(
        f"{path} is tagged as rotated by {abs(frame.rotation)} degrees, which is not a quarter turn.",
        with_commands("Turn the pictures themselves:", _remake(path)),
    )


def _cut_short(path: Path) -> InputError:
    return InputError(
        f"{path} is damaged or cut short: it ends before the length that it promises.",
        with_commands("Copy or download it again, or keep what can be read:", _remake(path)),
    )


def _remake(path: Path, options: str = "") -> str:
    """The ffmpeg command that decodes all readable frames and writes them as a plain clip."""
    fixed = path.with_name(f"{path.stem}.fixed.mp4")
    return f"ffmpeg {options}-i {shlex.quote(str(path))} -c:v libx264 -crf 16 {shlex.quote(str(fixed))}"
