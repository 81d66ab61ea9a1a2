"""Sources of live frames. Each has a thread of its own, and stops when it is asked or has no more frames.

`PlayedClip` plays the clips of a file at their own rate, from `start` on. `Stream` reads a camera or the
network; it reads from the beginning, so that nothing piles up while a model is opened, and delivers frames
from `start` on. A frame's time is its own, in seconds after the first one that is delivered; where a stream
has none, or jumps, it is the time of its arrival.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from trt_wan.errors import InputError
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.live.intake import Pictures
from trt_wan.runtime.video.container import READING, video_stream
from trt_wan.runtime.video.reader import Upright, deinterlaced

Deliver = Callable[[float, Callable[[], Pictures]], None]
Ended = Callable[[str, BaseException | None], None]
Open = Callable[[str], InputContainer]

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
CAMERA = re.compile(r"/dev/video\d+")
PAUSES = (1.0, 2.0, 4.0)  # seconds before each attempt to open a lost rtsp stream again
OPENING, LISTENING = 30.0, 600.0  # seconds for a stream to begin; LISTENING where we wait for its sender
SILENCE = 8.0  # seconds without a byte after which a stream is lost
JUMP = 3.0  # seconds from frame to frame that no stream has: its clock was set anew
# Little is read to find the streams, and nothing is kept back: a stream is shown as it comes.
LIVE = {"fflags": "nobuffer", "flags": "low_delay", "probesize": "1000000", "analyzeduration": "1000000"}
MOST_BROKEN = 300  # packets in a row that cannot be decoded
USUAL_RATE = Fraction(30)  # frames per second of a stream that does not say
MOST_RATE = 240
FRAME = "frame"  # the name of a picture that is not prepared


class Source(Protocol):
    width: int
    height: int
    rate: Fraction  # frames per second

    def start(self, deliver: Deliver, ended: Ended) -> None:
        """Calls `deliver` for every frame from now on, and `ended` with a sentence after the last one, both
        in the source's thread.
        """
        ...

    def stop(self) -> None: ...


def is_stream(name: str) -> bool:
    """Whether it is a URL, a camera or stdin, not a file."""
    return name == "-" or bool(URL.match(name) or CAMERA.fullmatch(name))


def without_password(name: str) -> str:
    """A URL for messages and logs: rtsp://host/x of rtsp://user:password@host/x."""
    return re.sub(r"(?<=://)[^/]*@", "", name)


class PlayedClip:
    """A finished clip of `frames` frames, played at `rate`. `pictures` are those of frame k."""

    def __init__(
        self,
        size: tuple[int, int],
        frames: int,
        rate: Fraction,
        pictures: Callable[[int], Pictures],
        times: NDArray[np.float64] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`times` are the seconds of frames that come unevenly."""
        self.width, self.height = size
        self.rate, self._frames, self._pictures, self._times = rate, frames, pictures, times
        self._stop, self._clock = Event(), clock
        self._thread: Thread | None = None

    def start(self, deliver: Deliver, ended: Ended) -> None:
        self._thread = Thread(target=self._play, args=(deliver, ended), name="live source", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """Stops, and waits until no picture is read any more."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _play(self, deliver: Deliver, ended: Ended) -> None:
        began, error, why = self._clock(), None, "the clip has ended"
        try:
            for k in range(self._frames):
                seconds = float(k / self.rate) if self._times is None else float(self._times[k])
                if self._stop.wait(max(began + seconds - self._clock(), 0)):
                    break
                deliver(seconds, lambda k=k: self._pictures(k))  # type: ignore[misc]  # asked for at once
        except InputError as damage:
            why = damage.message.rstrip(".")
        except BaseException as caught:
            error = caught
        ended("stopped" if self._stop.is_set() else why, error)


class Stream:
    """Opens the stream at once. Raises InputError."""

    def __init__(
        self,
        name: str,
        progress: Progress = silent,
        open_stream: Open | None = None,
        pauses: tuple[float, ...] = PAUSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`progress` is called in the source's thread when the stream is lost and found."""
        self.name, self._url, self._progress, self._clock = without_password(name), name, progress, clock
        self._open, self._stop = open_stream or open_live, Event()
        self._pauses = pauses if name.lower().startswith("rtsp") else ()
        self._deliver: Deliver | None = None
        self._ended: Ended | None = None
        self._began: float | None = None  # the clock at the first delivered frame
        self._zero: float | None = None  # the stream's own time there
        self._last = 0.0  # the stream's own time at the last frame
        self._paced = name.lower().startswith("http")  # a file on the web comes faster than it plays
        container = self._open(name)
        try:
            stream = video_stream(container, Path(self.name))
            rate = stream.average_rate or stream.guessed_rate
            self.rate = Fraction(rate) if rate and 1 <= rate <= MOST_RATE else USUAL_RATE
            first, frames = self._first(container)
            self._upright = Upright(first, stream.sample_aspect_ratio, Path(self.name))
        except BaseException:
            container.close()
            raise
        self.width, self.height = self._upright.width, self._upright.height
        self.notes: list[Note] = [note for note in self._upright.notes if note.code != "untagged_colour"]
        args = (container, chain([first], frames))
        Thread(target=self._run, args=args, name="live source", daemon=True).start()

    def start(self, deliver: Deliver, ended: Ended) -> None:
        self._ended = ended
        self._deliver = deliver

    def stop(self) -> None:
        self._stop.set()

    def _run(self, container: InputContainer, frames: Iterator[VideoFrame]) -> None:
        error = None
        why = f"{self.name} has ended"
        try:
            while not self._stop.is_set():
                why = self._read(frames)
                container.close()
                again = None if self._stop.is_set() else self._again(why)
                if again is None:
                    break
                container, frames = again
        except InputError as damage:
            why = damage.message.rstrip(".")
        except BaseException as caught:
            error = caught
        with suppress(Exception):
            container.close()
        while self._ended is None and not self._stop.wait(0.1):  # the model is still being opened
            pass
        if self._ended is not None:
            self._ended("stopped" if self._stop.is_set() else why, error)

    def _read(self, frames: Iterator[VideoFrame]) -> str:
        """Delivers frames. Returns the reason of the end, in words."""
        self._zero = None
        try:
            for frame in frames:
                if self._stop.is_set():
                    break
                if (frame.width, frame.height) != self._upright.coded_size:
                    old, new = self._upright.coded_size, (frame.width, frame.height)
                    return f"{self.name} has changed from {old[0]}x{old[1]} to {new[0]}x{new[1]}"
                if self._deliver is not None:
                    seconds = self._seconds(frame)
                    self._deliver(seconds, lambda frame=frame: self._shown(frame))  # type: ignore[misc]
        except av.FFmpegError as error:
            return f"{self.name} is lost ({_reason(error)})"
        return f"{self.name} has ended"

    def _shown(self, frame: VideoFrame) -> Pictures:
        return {FRAME: np.ascontiguousarray(self._upright.picture(frame))}

    def _seconds(self, frame: VideoFrame) -> float:
        now = self._clock()
        if self._began is None:
            self._began = now
        if frame.time is None:
            return now - self._began
        if self._zero is None or not 0 <= frame.time - self._last <= JUMP:
            self._zero = frame.time - (now - self._began)
        self._last = frame.time
        seconds = frame.time - self._zero
        if self._paced:
            self._stop.wait(max(self._began + seconds - now, 0))
        return seconds

    def _again(self, why: str) -> tuple[InputContainer, Iterator[VideoFrame]] | None:
        """The stream, opened again; None if it is not found."""
        for number, pause in enumerate(self._pauses, 1):
            text = f"{why}: opening it again ({number} of {len(self._pauses)})."
            self._progress(Note(text, "stream_lost", {"attempt": number}))
            if self._stop.wait(pause):
                return None
            with suppress(InputError):
                container = self._open(self._url)
                try:
                    first, frames = self._first(container)
                except BaseException:
                    container.close()
                    raise
                self._progress(Note(f"{self.name} is there again.", "stream_found"))
                return container, chain([first], frames)
        return None

    def _first(self, container: InputContainer) -> tuple[VideoFrame, Iterator[VideoFrame]]:
        """The first frame, and the others. Raises InputError if none comes."""
        stream = video_stream(container, Path(self.name))
        stream.thread_type = "SLICE"  # threads by frame would hold frames back
        frames = _decoded(container, stream)
        try:
            first = next(frames)
        except (StopIteration, av.FFmpegError) as error:
            told = "" if isinstance(error, StopIteration) else f" ({_reason(error)})"
            text = f"No picture came from {self.name}{told}."
            raise InputError(text, "Check that it is sending.") from error
        if first.interlaced_frame:
            frames = deinterlaced(chain([first], frames))
            first = next(frames)
        return first, frames


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Leaves out packets that cannot be decoded: a stream may begin between key frames, or lose some."""
    broken = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            broken += 1
            if broken > MOST_BROKEN:
                raise
            continue
        for frame in frames:
            broken = 0
            yield frame


def _reason(error: Exception) -> str:
    if isinstance(error, av.ExitError):  # ffmpeg says "Immediate exit requested"
        return "nothing comes"
    return getattr(error, "strerror", None) or str(error)


def open_live(name: str, options: dict[str, str] | None = None) -> InputContainer:
    """Opens a URL, /dev/videoN or `-`. Raises InputError."""
    chosen = {**READING, **LIVE, **(options or {})}
    opening = LISTENING if "listen=1" in name else OPENING
    more: dict[str, Any] = {"timeout": (opening, SILENCE), "options": chosen}
    if CAMERA.fullmatch(name):
        more["format"] = "v4l2"
    elif name.lower().startswith("rtsp"):
        chosen.setdefault("rtsp_flags", "prefer_tcp")  # UDP loses packets, and does not pass most firewalls
    try:
        container: InputContainer = av.open(
            "pipe:0" if name == "-" else name, metadata_errors="ignore", **more
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        kind = "camera" if CAMERA.fullmatch(name) else "stream"
        hint = "Check the address, and that it is sending."
        if kind == "camera":
            hint = "Check its number with `ls /dev/video*`, and that no other program has it."
        raise InputError(
            f"The {kind} {without_password(name)} cannot be opened ({_reason(error)}).", hint
        ) from error
    return container
