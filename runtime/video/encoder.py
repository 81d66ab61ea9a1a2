"""The encoder of the pictures. Files that it makes do not depend on the machine's number of CPUs."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import av
from av.codec.context import Flags, ThreadType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

# x264's output depends on its number of threads, so the number is computed from the picture's height. By
# default PyAV has x264 cut every picture into one slice per CPU: files differ between machines, and threads
# wait for each other at every picture. Encoding whole pictures in parallel costs little while motion search
# can reach far enough up and down. File sizes of two made-up clips of 480 lines, calm and very fast, against
# one thread: 4 pictures +0 and +6 %, 5 +0 and +43 %, 8 -1 and +71 %, 7 slices +23 and +87 %.
LINES_PER_ENCODER, MOST_ENCODERS = 120, 8
# x264's macroblock tree reads uninitialised memory (seen with PyAV 18.1, not with asm=0): the same frames
# gave different files. Remove this option when the test for it in test_video.py passes without.
DETERMINISTIC = "mbtree=0"


# VP9's CRF has another scale. On the sample at 832x480 with noise, 24 gives the PSNR of x264 at 18, 42.4 dB.
# `cpu-used` 2 takes twice the time of 4 and saves nothing there.
VP9 = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1", "tile-columns": "1"}


def x264(crf: int, preset: str) -> dict[str, str]:
    return {"crf": str(crf), "preset": preset, "x264-params": DETERMINISTIC}


@dataclass(frozen=True)
class Encoding:
    """All that decides about the encoded pictures, except the pictures."""

    encoder: str
    width: int
    height: int
    rate: Fraction  # frames per second
    options: Mapping[str, str] = field(default_factory=dict)

    def open(self) -> VideoStream:
        """A new encoder. Its packets count time in frames, and its stream is a template for muxers."""
        gc.collect()  # PyAV's containers and streams hold each other, so encoders of earlier windows live on
        nowhere = av.open("-", "w", format="null")
        stream = nowhere.add_stream(self.encoder, rate=self.rate, options=dict(self.options))
        assert isinstance(stream, VideoStream), f"{self.encoder} encodes no pictures"
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        codec = stream.codec_context
        codec.time_base = 1 / self.rate
        codec.thread_type, codec.thread_count = ThreadType.FRAME, encoders(self.height)
        codec.flags |= Flags.global_header  # the headers of files need it, and "null" does not ask for it
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        nowhere.start_encoding()
        return stream


def encoders(height: int) -> int:
    """x264's threads for pictures of that height."""
    return min(max(height // LINES_PER_ENCODER, 1), MOST_ENCODERS)
