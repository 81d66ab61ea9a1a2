"""Opens a video file and measures it: the number of its frames, their rate, and whether they come evenly.

Containers are often wrong about their length and rate, so both are measured in one pass over the packets,
without decoding.
"""

import os
import shlex
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from trt_wan.errors import InputError, with_commands
from trt_wan.runtime.events import Note
from trt_wan.runtime.video.cut import Cut

# Pixels. H.264 stops at about this size, and few cameras have more; a picture at the limit is 0.4 GB of RGB.
MAX_SIDE, MAX_PIXELS = 1 << 14, 1 << 27
MIN_SIDE = 16
# Seconds of sound against picture over the whole clip (ITU-R BT.1359 accepts -185 to +90 ms).
MAX_DRIFT = Fraction(1, 10)
# Seconds that a container may promise beyond its last packet: headers are rounded up.
MAX_SHORTFALL = Fraction(1)
# Frames whose spacing differs by more than this part from the usual spacing count as uneven.
UNEVEN = Fraction(1, 5)
READING = {"max_pixels": str(MAX_PIXELS)}  # decoders refuse larger frames before they allocate them


def open_container(path: Path) -> InputContainer:
    """Raises InputError for a file that is no video."""
    refuse_missing(path)
    try:
        # An absolute path, because ffmpeg takes `a:b.mp4` for a protocol called `a`.
        container = av.open(str(path.absolute()), metadata_errors="ignore", options=READING)
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a video ({error.strerror}).",
            with_commands("If a player can show it, convert it:", remake(path)),
        ) from error
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        container.close()
        raise InputError(
            f"{path} is a picture, not a video.",
            "Give a video file here, for example an .mp4, or a folder of numbered pictures.",
        )
    return container


def refuse_missing(path: Path) -> None:
    """Raises InputError where there is no file with something in it."""
    if not os.path.exists(path):  # unlike Path.exists, not an OSError for a name that is too long
        raise InputError(f"There is no file {path}.", "Check the path.")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file.", "Give the file itself.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes).", "Copy or download it again.")


def refuse_size(path: Path, width: int, height: int) -> None:
    """Raises InputError for a size that is too large to be read, or too small to show anything.

    0 stands for a size that the decoder could not read or refused.
    """
    if not (width and height) or max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        size = f"is {width}x{height}" if width and height else "is too large, or its header is damaged"
        raise InputError(
            f"{path} {size}; at most {MAX_SIDE} pixels a side and {MAX_PIXELS} in all can be read.",
            "Make it smaller.",
        )
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{path} is {width}x{height}; at least {MIN_SIDE} pixels a side are needed to show anything.",
            "Give the file in its full size.",
        )


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first video stream that is not the cover picture of a song."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:  # PyAV's types do not say so
                raise InputError(
                    f"{path} has a video that cannot be decoded: its codec is unknown.",
                    with_commands("If a player shows it, convert the file:", remake(path)),
                )
            refuse_size(path, stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.options = READING
            return stream
    raise InputError(f"{path} has no video in it.", "Give a file with moving pictures.")


def sound_stream(container: InputContainer) -> AudioStream | None:
    """The first audio stream whose codec is known."""
    known = (stream for stream in container.streams.audio if stream.codec_context is not None)
    return next(known, None)


@dataclass(frozen=True)
class Measured:
    """The frames of a clip that are used, of those that are shown: an edit list hides some."""

    used: range  # their numbers
    rate: Fraction  # frames per second
    start: Fraction  # seconds from the first frame that is shown to the first that is used
    start_pts: int | None  # the time of that frame, in the stream's units
    times: NDArray[np.float64] | None  # seconds from the first used frame, of frames that come unevenly
    notes: list[Note]  # then one


def measure(path: Path, cut: Cut | None = None) -> Measured:
    """Raises InputError for a clip that cannot be used or is shorter than `cut`."""
    count, end = 0, Fraction(0)
    times: list[int] = []  # frame times in units of the stream's time base
    with open_container(path) as container:
        video = video_stream(container, path)
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
        times.sort()
        tick = video.time_base or Fraction(0)
        if cut is None:
            used = range(count)
        elif len(times) == count:
            used = cut.of(path, (np.asarray(times) - times[0]) * float(tick))
        else:  # frames without times are taken as even
            used = cut.of(path, np.arange(count) / float(_rate(video, count, Fraction(0), path)))
        timed = len(times) == count
        shown = times[used.start : used.stop] if timed else times
        span = (shown[-1] - shown[0]) * tick if shown else Fraction(0)
        rate = _rate(video, len(used), span, path)
    start = (shown[0] - times[0]) * tick if timed and times else used.start / rate
    seconds = np.asarray(shown) * float(tick)
    notes = uneven(path, np.diff(seconds), rate, float(tick))
    first = shown[0] if timed and times else None
    return Measured(
        used, rate, Fraction(start), first, seconds - seconds[0] if notes and timed else None, notes
    )


def uneven(path: Path, spacing: NDArray[np.float64], rate: Fraction, tick: float) -> list[Note]:
    """A note if frames come unevenly. `spacing` between frames and the container's `tick` are in seconds."""
    usual = float(np.sort(spacing)[(len(spacing) - 1) // 2]) if len(spacing) else 0.0  # the lower median
    off = int((np.abs(spacing - usual) > max(UNEVEN * usual, 1.5 * tick)).sum()) if usual else 0
    if not off:
        return []
    low, high = float(spacing.min()) * 1000, float(spacing.max()) * 1000
    return [
        Note(
            f"{path.name} has a variable rate: {off} of {len(spacing)} frames are shown for other than the "
            f"usual {usual * 1000:.0f} ms ({low:.0f} to {high:.0f}). The video has the mean: "
            f"{float(rate):.2f} frames per second.",
            "variable_rate",
            {"file": str(path), "uneven": off, "ms": [round(low, 1), round(high, 1)], "rate": float(rate)},
        )
    ]


def _rate(video: VideoStream, count: int, span: Fraction, path: Path) -> Fraction:
    """The declared rate if it fits the timestamps (often rounded to ms), else the measured rate."""
    declared = video.average_rate or video.guessed_rate
    if declared and (not span or abs((count - 1) / declared - span) <= MAX_DRIFT):
        return Fraction(declared)
    if not span:
        raise InputError(
            f"{path} does not say how many frames it has per second.",
            with_commands("Say it:", remake(path, "-r 30 ")),
        )
    return ((count - 1) / span).limit_denominator(1001)


def _cut_short(path: Path) -> InputError:
    return InputError(
        f"{path} is damaged or cut short: it ends before the length that it promises.",
        with_commands("Copy or download it again, or keep what can be read:", remake(path)),
    )


def remake(path: Path, options: str = "", filters: str = "") -> str:
    """The ffmpeg command that decodes all readable frames and writes them as a plain clip."""
    source, fixed = (shlex.quote(str(file)) for file in (path, path.with_name(f"{path.stem}.fixed.mp4")))
    filtered = f"-vf {filters} " if filters else ""
    return f"ffmpeg {options}-i {source} {filtered}-c:v libx264 -crf 16 {fixed}"
