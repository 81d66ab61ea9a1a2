"""Reads video files. Knows no people, no model's sizes and no resampling in time.

A frame is uint8 RGB [H, W, 3], turned upright, of square pixels, at the file's own size: pixels that are not
square are resampled, so that no line or column is lost. Colours follow the file's tags, and HDR and wide
gamuts become BT.709. An untagged clip is read as BT.601 limited range, as all readers built on swscale do.
Interlaced frames are deinterlaced. Transparent pixels show white.

Every departure from a plain clip is in `notes`. Frames are decoded in order, on request.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from trt_wan.errors import InputError, with_commands
from trt_wan.runtime.closing import Closing
from trt_wan.runtime.events import Note
from trt_wan.runtime.video.container import (
    measure,
    open_container,
    refuse_size,
    remake,
    sound_stream,
    video_stream,
)
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.transparency import COLOURS, over, transparency_note

Picture = NDArray[np.uint8]

# Frames with pixels that are further from square than this are damaged, not meant.
MAX_PIXEL_ASPECT = 8
REFERENCE_WHITE = 203  # cd/m² of HDR that become the white of BT.709 (ITU-R BT.2408)
HDR: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
WIDE: dict[int, str] = {
    ColorPrimaries.BT2020: "BT.2020",
    ColorPrimaries.SMPTE431: "P3",
    ColorPrimaries.SMPTE432: "P3",
}
BEHIND = "white"  # behind transparent pixels
# By angle in degrees, in the form of `_turn`.
QUARTER_TURNS = {0: (False, 1, 1), 90: (True, -1, 1), 180: (False, -1, -1), 270: (True, 1, -1)}
UNTAGGED = 2  # ffmpeg's number for a colour matrix that is not known


class Frames(Closing):
    """Frames of one size, by number, in a context manager. `Clip` and `Stills` (stills.py) find them."""

    width: int
    height: int

    def window(self, indices: Sequence[int]) -> Picture:
        """Frames [n, H, W, 3] by number, in any order and with repeats. A Clip goes back by its `history`."""
        pictures = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        for picture, index in zip(pictures, indices, strict=True):
            picture[:] = self._picture(index)
        return pictures

    def close(self) -> None:
        """Closes the files, if any are open."""

    def _picture(self, index: int) -> Picture:
        raise NotImplementedError


class Clip(Frames):
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
    notes: list[Note]
    used: range  # the frames' numbers in the file
    start: Fraction  # seconds from the file's first frame to this clip's
    times: NDArray[np.float64] | None  # seconds from the first frame, of frames that come unevenly

    def __init__(self, path: Path, history: int = 1, cut: Cut | None = None) -> None:
        """With `cut` the clip consists of those frames alone."""
        assert history >= 1, f"history is {history}"
        self.path = path
        found = measure(path, cut)
        self.used, self.rate, self.start, self.notes = found.used, found.rate, found.start, found.notes
        self.frames, self.times = len(self.used), found.times
        self._container = open_container(path)
        try:
            stream = video_stream(self._container, path)
            stream.thread_type = "AUTO"
            self.has_sound = sound_stream(self._container) is not None
            if self._container.streams.audio and not self.has_sound:
                text = f"{path.name} has sound whose codec is unknown: it is left out."
                self.notes.append(Note(text, "unknown_sound", {"file": str(path)}))
            self._coming: Iterator[VideoFrame] = self._container.decode(stream)
            if self.used.start:
                stream = self._skip(stream, found.start_pts)
            self._kept: deque[VideoFrame] = deque(maxlen=history)
            self._decoded = 0
            self._decode_next()
            first = self._kept[0]
            self._upright = Upright(first, stream.sample_aspect_ratio, path)
            if first.interlaced_frame:
                self._coming = deinterlaced(chain([first], self._coming))
                self._kept.clear()
                self._decoded = 0
                self._decode_next()
        except InputError:
            self._container.close()
            raise
        self.width, self.height = self._upright.width, self._upright.height
        self.notes += self._upright.notes

    def close(self) -> None:
        self._container.close()
        self._kept.clear()

    def _skip(self, stream: VideoStream, pts: int | None) -> VideoStream:
        """Goes to the first used frame: from the key frame before it by its time, else by counting from the
        start of the file, which is opened again. Returns the stream.
        """
        if pts is not None:
            with suppress(av.FFmpegError):
                self._container.seek(pts, stream=stream)
                for frame in self._coming:
                    if frame.pts == pts:
                        self._coming = chain([frame], self._coming)
                        return stream
                    if frame.pts is None or frame.pts > pts:
                        break
        self._container.close()
        self._container = open_container(self.path)
        stream = video_stream(self._container, self.path)
        stream.thread_type = "AUTO"
        self._coming = islice(self._container.decode(stream), self.used.start, None)
        return stream

    def _picture(self, index: int) -> Picture:
        assert 0 <= index < self.frames, f"frame {index} of {self.frames}"
        while self._decoded <= index:
            self._decode_next()
        oldest = self._decoded - len(self._kept)
        assert index >= oldest, (
            f"frame {index} is gone: {oldest} is the oldest kept (history {self._kept.maxlen})"
        )
        frame = self._kept[index - oldest]
        if (frame.width, frame.height) != (coded := self._upright.coded_size):
            number, first = self.used[index], "x".join(map(str, coded))
            raise InputError(
                f"{self.path} changes its size at frame {number}: {first} to {frame.width}x{frame.height}.",
                with_commands("Make one size of it:", remake(self.path)),
            )
        return self._upright.picture(frame)

    def _decode_next(self) -> None:
        here = self.used.start + self._decoded
        try:
            self._kept.append(next(self._coming))
        except StopIteration:
            raise InputError(
                f"{self.path} is damaged: of its {self.used.stop} frames only {here} can be decoded.",
                with_commands("Keep what can be read:", remake(self.path)),
            ) from None
        except av.FFmpegError as error:
            raise InputError(
                f"{self.path} is damaged: it cannot be decoded after frame {here} of {self.used.stop} "
                f"({error.strerror}).",
                with_commands("Keep what can be read:", remake(self.path)),
            ) from error
        self._decoded += 1


class Upright:
    """Makes pictures of decoded frames: upright, of square pixels, in the colours of BT.709. All frames must
    have the coded size of the first. Raises InputError for one that cannot be shown.
    """

    def __init__(self, first: VideoFrame, pixel_aspect: Fraction | None, path: Path) -> None:
        self.coded_size = (first.width, first.height)
        (width, height), aspect = _square(pixel_aspect, self.coded_size, path)
        self._turn = _turn(first, path)
        self._as_rgb: dict[str, Any] = {"format": "rgba" if _has_opacity(first) else "rgb24"}
        self._as_rgb |= _to_bt709(first)
        if (width, height) != self.coded_size:
            self._as_rgb |= {"width": width, "height": height, "interpolation": Interpolation.LANCZOS}
        self._scaler = VideoReformatter()
        self.width, self.height = (height, width) if self._turn[0] else (width, height)
        self.notes = _notes(path, first, aspect, (self.width, self.height))
        if _has_opacity(first):
            opacity = first.to_ndarray(format="rgba")[..., 3]
            self.notes += [transparency_note(path, opacity, BEHIND)] if opacity.min() < 255 else []

    def picture(self, frame: VideoFrame) -> Picture:
        transpose, rows, columns = self._turn
        picture = self._rgb(frame)
        picture = picture.transpose(1, 0, 2) if transpose else picture
        return picture[::rows, ::columns]

    def _rgb(self, frame: VideoFrame) -> Picture:
        picture = np.asarray(self._scaler.reformat(frame, **self._as_rgb).to_ndarray(), np.uint8)
        return picture if picture.shape[2] == 3 else over(picture[..., :3], picture[..., 3], COLOURS[BEHIND])


def _turn(frame: VideoFrame, path: Path) -> tuple[bool, int, int]:
    """How to set the frame upright: whether to transpose it, then its steps (1, -1) along rows and columns.

    The display matrix is int32 [3, 3]: ((a, b), (c, d)) top left turns (x, y) into (a·x + c·y, b·x + d·y).
    PyAV's `rotation` is one angle and cannot tell a mirrored picture from a turned one.
    """
    side_data: Any  # PyAV's stubs have motion vectors only
    try:
        side_data = frame.side_data
    except ValueError:  # PyAV 18.1 knows not all kinds of ffmpeg's, such as EXIF: it has the angle still
        return QUARTER_TURNS[frame.rotation % 360] if frame.rotation % 90 == 0 else (False, 1, 1)
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
        with_commands("Turn the pictures themselves:", remake(path)),
    )


def _square(aspect: Fraction | None, size: tuple[int, int], path: Path) -> tuple[tuple[int, int], Fraction]:
    """The size with square pixels, and the width of the file's pixels over their height."""
    if not aspect or aspect == 1:
        return size, Fraction(1)
    if not Fraction(1, MAX_PIXEL_ASPECT) <= aspect <= MAX_PIXEL_ASPECT:
        raise InputError(
            f"{path} is tagged with pixels of {aspect.numerator}:{aspect.denominator}, which no clip has.",
            with_commands("Make them square:", remake(path, filters="setsar=1")),
        )
    width, height = size
    size = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    refuse_size(path, *size)
    return size, aspect


def _to_bt709(frame: VideoFrame) -> dict[str, int]:
    """How to convert the frame's colours; nothing for BT.709 and the like.

    swscale takes light up to reference white to the levels with which a BT.1886 display shows it, and clips
    brighter light.
    """
    if frame.color_trc in HDR:
        return {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
    if frame.color_primaries in WIDE:
        return {"dst_color_trc": frame.color_trc, "dst_color_primaries": ColorPrimaries.BT709}
    return {}


def deinterlaced(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """As many frames, each from its first field; progressive ones as they are."""
    graph: Graph | None = None
    size = (0, 0)
    for frame in chain(frames, (None,)):
        if graph is None:
            assert frame is not None, "there is a first frame"
            graph, size = Graph(), (frame.width, frame.height)
            graph.link_nodes(
                graph.add_buffer(
                    width=size[0],
                    height=size[1],
                    format=frame.format,
                    time_base=frame.time_base or Fraction(1, 25),
                ),
                graph.add("bwdif", "mode=send_frame:deint=interlaced"),
                graph.add("buffersink"),
            ).configure()
        if frame is not None and (frame.width, frame.height) != size:
            yield frame  # the caller refuses it
            return
        graph.vpush(frame)
        try:
            while True:
                yield graph.vpull()
        except (BlockingIOError, EOFError):
            pass


def _has_opacity(frame: VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _notes(path: Path, frame: VideoFrame, aspect: Fraction, size: tuple[int, int]) -> list[Note]:
    """Of a clip's first frame; `size` is that with square pixels."""
    notes, file = [], {"file": str(path)}

    def say(text: str, code: str, **data: object) -> None:
        notes.append(Note(f"{path.name} {text}", code, {**file, **data}))

    if aspect != 1:
        pixels, coded = f"{aspect.numerator}:{aspect.denominator}", f"{frame.width}x{frame.height}"
        say(
            f"has pixels of {pixels}; it is shown as {size[0]}x{size[1]} of square ones, not as {coded}.",
            "pixel_aspect",
            pixels=pixels,
            coded=coded,
            shown=f"{size[0]}x{size[1]}",
        )
    if frame.interlaced_frame:
        say("is interlaced; every frame is deinterlaced (bwdif).", "interlaced")
    primaries = WIDE.get(frame.color_primaries, "BT.709")
    if transfer := HDR.get(frame.color_trc):
        say(
            f"is HDR ({transfer}, {primaries}); it is converted to BT.709 with {REFERENCE_WHITE} cd/m² as "
            "white, and brighter light is white too.",
            "hdr",
            transfer=transfer,
            primaries=primaries,
            reference_white=REFERENCE_WHITE,
        )
    elif frame.color_primaries in WIDE:
        say(
            f"has the colours of {primaries}; they are converted to BT.709.",
            "wide_gamut",
            primaries=primaries,
        )
    shape = frame.format
    needs_matrix = len(shape.components) > 2 and not shape.is_rgb and not shape.name.startswith("yuvj")
    if frame.colorspace == UNTAGGED and needs_matrix:
        say("has no colour tags; it is read as BT.601 of limited range.", "untagged_colour", read_as="BT.601")
    return notes
