"""A GIF of a finished video: one palette for all frames, made in a first pass over them.

A GIF counts hundredths of a second, and players show a frame for two of them at least: above 50 frames per
second every second frame is left out, and so on. A frame's time is off by 5 ms at most, and the length too.
"""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from math import ceil
from pathlib import Path

import av
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

CLOCK = Fraction(1, 100)  # seconds
MOST_RATE = 50  # frames per second


def write_gif(video: Path, rate: Fraction, count: int) -> Path:
    """Replaces the file `video`, of `count` frames, by a GIF beside it. Raises OSError or av.FFmpegError."""
    target = video.with_suffix(".gif")
    try:
        palette = _palette(video)
        step = ceil(rate / MOST_RATE)
        last = _time((count - 1) // step * step, rate)
        options = {"final_delay": str(_time(count, rate) - last)}
        with av.open(str(target.absolute()), "w", format="gif", options=options) as output:
            stream: VideoStream | None = None
            for number, frame in enumerate(_indexed(video, palette)):
                if number % step:
                    continue
                if stream is None:
                    stream = output.add_stream("gif", rate=100)
                    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "pal8"
                    stream.codec_context.time_base = CLOCK
                frame.pts, frame.time_base = _time(number, rate), CLOCK
                output.mux(stream.encode(frame))
            assert stream is not None, f"{video} has frames"
            output.mux(stream.encode(None))
        return target
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        video.unlink(missing_ok=True)


def _time(number: int, rate: Fraction) -> int:
    return round(number / rate / CLOCK)


def _frames(video: Path) -> Iterator[VideoFrame]:
    with av.open(str(video.absolute())) as source:
        yield from source.decode(video=0)


def _palette(video: Path) -> VideoFrame:
    graph = Graph()
    for number, frame in enumerate(_frames(video)):
        if number == 0:
            maker = graph.add("palettegen", "reserve_transparent=0")
            graph.link_nodes(_source(graph, frame), maker, graph.add("buffersink")).configure()
        graph.vpush(frame)
    graph.vpush(None)
    return graph.vpull()


def _indexed(video: Path, palette: VideoFrame) -> Iterator[VideoFrame]:
    """The frames in the colours of the palette."""
    graph, pictures = Graph(), None
    for frame in _frames(video):
        if pictures is None:
            pictures, colours = _source(graph, frame), _source(graph, palette)
            user, sink = graph.add("paletteuse", "diff_mode=rectangle"), graph.add("buffersink")
            pictures.link_to(user, 0, 0)
            colours.link_to(user, 0, 1)
            user.link_to(sink)
            graph.configure()
            palette.pts, palette.time_base = 0, frame.time_base
            colours.push(palette)
            colours.push(None)
        pictures.push(frame)
        yield from _pulled(graph)
    if pictures is not None:
        pictures.push(None)
        yield from _pulled(graph)


def _pulled(graph: Graph) -> Iterator[VideoFrame]:
    with suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.vpull()


def _source(graph: Graph, frame: VideoFrame) -> FilterContext:
    time_base = frame.time_base or CLOCK
    return graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
