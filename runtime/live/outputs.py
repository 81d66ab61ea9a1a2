"""Where live pictures go: a file, which `VideoWriter` makes, or a stream of H.264.

Both have the rate of the source. A stream is encoded without delay: a picture is sent when it is written.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from trt_wan.errors import OutputError, UsageError
from trt_wan.runtime.live.sources import without_password
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.writer import SCALER

URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# ffmpeg's muxer by the scheme of the URL; - is stdout.
MUXERS = {
    **dict.fromkeys(("rtmp", "rtmps"), "flv"),
    "rtsp": "rtsp",
    **dict.fromkeys(("udp", "tcp", "srt"), "mpegts"),
    "-": "mpegts",
}
KEY_SECONDS = 2  # from key frame to key frame: a viewer who comes later waits no longer
CRF = 23  # x264's own default
CONNECTING, SENDING = 15.0, 15.0  # seconds after which a stream has failed


class Output(Protocol):
    """As a `VideoWriter`."""

    def write(self, frame: Picture) -> None: ...

    def settle(self, then: Callable[[Any], object]) -> None:
        """Call after a window. A thread calls `then` when its pictures are there."""
        ...

    def check(self) -> None: ...

    def finish(self) -> object: ...

    def abandon(self, keep: bool, at_once: bool = False) -> Path | None: ...


def is_stream(name: str) -> bool:
    return name == "-" or URL.match(name) is not None


def muxer_of(name: str) -> str:
    """Raises UsageError for a URL that cannot be written to."""
    scheme = name if name == "-" else name.partition("://")[0].lower()
    if scheme not in MUXERS:
        raise UsageError(
            f"Nothing can be sent to {scheme}://.",
            f"Use one of {', '.join(f'{scheme}://' for scheme in MUXERS if scheme != '-')}, a file, or - for "
            "stdout.",
        )
    return MUXERS[scheme]


class StreamOutput:
    """Connects at once. Raises OutputError."""

    def __init__(self, name: str, width: int, height: int, rate: Fraction, crf: int | None = None) -> None:
        self.name, self._scaler, self._frames, self._rate = name, VideoReformatter(), 0, rate
        target, muxer = "pipe:1" if name == "-" else name, muxer_of(name)
        options = {"rtsp_transport": "tcp"} if muxer == "rtsp" else {"flush_packets": "1"}
        try:
            self._container = av.open(
                target, "w", format=muxer, options=options, timeout=(CONNECTING, SENDING)
            )
            quality = {"preset": "veryfast", "tune": "zerolatency", "crf": str(CRF if crf is None else crf)}
            stream = self._container.add_stream("libx264", rate=rate, options=quality)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = 1 / rate
            stream.codec_context.gop_size = max(round(KEY_SECONDS * rate), 1)
            self._stream = stream
            self._container.start_encoding()
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._failed("cannot be opened", error) from error

    def write(self, frame: Picture) -> None:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = self._scaler.reformat(
            picture,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALER,
        )
        picture.pts, picture.time_base = self._frames, 1 / self._rate
        self._frames += 1
        self._send(picture)

    def settle(self, then: Callable[[Any], object]) -> None:
        then(None)  # everything is sent already

    def check(self) -> None:
        """`write` has raised every error."""

    def finish(self) -> None:
        self._send(None)
        try:
            self._container.close()
        except (av.FFmpegError, OSError) as error:
            raise self._failed("is lost", error) from error

    def abandon(self, keep: bool, at_once: bool = False) -> None:
        try:
            self._container.close()
        except (av.FFmpegError, OSError):
            pass  # it is lost already

    def _send(self, picture: av.VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(picture))
        except (av.FFmpegError, OSError) as error:
            raise self._failed("is lost", error) from error

    def _failed(self, what: str, error: Exception) -> OutputError:
        if self.name == "-" and isinstance(error, BrokenPipeError):
            return OutputError(
                "Nothing reads the video on stdout any more.", "Check the program behind the pipe."
            )
        reason = getattr(error, "strerror", None) or str(error)
        text = f"The output {without_password(self.name)} {what} ({reason})."
        return OutputError(text, "Check that its receiver is running.")
