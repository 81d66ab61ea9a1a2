"""The encoder of the pictures. Files that it makes do not depend on the machine's number of CPUs."""

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
from av.codec.context import Flags, ThreadType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

from trt_wan.errors import UsageError, shown
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.video.kinds import KINDS, Kind

# x264's output depends on its number of threads, so the number is computed from the picture's height. By
# default PyAV has x264 cut every picture into one slice per CPU: files differ between machines, and threads
# wait for each other at every picture. Encoding whole pictures in parallel costs little while motion search
# can reach far enough up and down. File sizes of two made-up clips of 480 lines, calm and very fast, against
# one thread: 4 pictures +0 and +6 %, 5 +0 and +43 %, 8 -1 and +71 %, 7 slices +23 and +87 %.
LINES_PER_ENCODER, MOST_ENCODERS = 120, 8
# x264's macroblock tree reads uninitialised memory (seen with PyAV 18.1, not with asm=0): the same frames
# gave different files. Remove this option when the test for it in test_video.py passes without.
DETERMINISTIC = "mbtree=0"


@dataclass(frozen=True)
class Codec:
    """A row of CODECS."""

    encoder: str  # ffmpeg's name
    crf: int | None  # the default on the encoder's own scale; None: there is none
    most_crf: int
    options: Mapping[str, str]
    pixels: str = "yuv420p"
    quality: str = "crf"  # the encoder's option


# The defaults of `crf` give the PSNR of x264 at 18 (visually lossless) within 1 dB, on the sample at 832x480
# with noise. VP9's `cpu-used` 2 takes twice the time of 4 and saves nothing there. x265 and SVT-AV1 make the
# same packets with any number of threads; `info=0` leaves out a text about them.
CODECS = {
    "h264": Codec("libx264", 18, 51, {"preset": "medium", "x264-params": DETERMINISTIC}),
    "hevc": Codec("libx265", 18, 51, {"preset": "medium", "x265-params": "log-level=error:info=0"}),
    "av1": Codec("libsvtav1", 16, 63, {"preset": "7"}),
    "vp9": Codec(
        "libvpx-vp9",
        24,
        63,
        {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1", "tile-columns": "1"},
    ),
    "prores": Codec("prores_ks", None, 0, {"profile": "hq", "vendor": "apl0"}, "yuv422p10le"),
}
# On the card, which data-centre cards (A100, H100, H200) cannot. The number of `crf` is taken as a constant
# quantiser, on the same scale; sizes and times were not measured.
_NVENC = {"preset": "p5", "tune": "hq", "rc": "constqp"}
NVENC = {
    "h264": Codec("h264_nvenc", 18, 51, _NVENC, quality="qp"),
    "hevc": Codec("hevc_nvenc", 18, 51, _NVENC, quality="qp"),
}
PROBE = 256, 144, Fraction(25)  # a size that every NVENC takes


@dataclass(frozen=True)
class Quality:
    """Codec and quality of the pictures. None: the default of the file's kind or of the codec."""

    codec: str | None = None
    crf: int | None = None
    preset: str | None = None  # x264's
    encoder: str | None = None  # "nvenc"; None: the CPU's

    def codec_of(self, kind: Kind) -> Codec:
        name = self.codec or kind.codecs[0]
        return (CODECS if self.encoder is None else NVENC)[name]

    def encoding(self, kind: Kind, width: int, height: int, rate: Fraction) -> "Encoding":
        codec = self.codec_of(kind)
        options = {**codec.options}
        if codec.crf is not None:
            options[codec.quality] = str(codec.crf if self.crf is None else self.crf)
        if self.preset is not None:
            assert codec is CODECS["h264"], "presets are x264's"
            options["preset"] = self.preset
        return Encoding(codec.encoder, width, height, rate, options, codec.pixels)

    def require_possible(self, output: Path) -> None:
        """Raises UsageError for a codec that the video `output` cannot have, or a CRF out of range."""
        suffix = output.suffix.lower()
        name = self.codec or KINDS[suffix].codecs[0]
        if name not in KINDS[suffix].codecs:
            files = ", ".join(ending for ending, kind in KINDS.items() if name in kind.codecs)
            raise UsageError(
                f"A file that ends in {suffix} cannot have the codec {name}.",
                f"Use one of {', '.join(KINDS[suffix].codecs)} for it; {name} goes into {files}.",
            )
        if self.encoder is not None and KINDS[suffix].is_gif:
            raise UsageError("A GIF has no use for NVENC.", "Leave out --encoder, or write an .mp4.")
        if self.encoder is not None and name not in NVENC:
            raise UsageError(
                f"NVENC does not encode {name} here.",
                f"Use --codec {' or '.join(NVENC)} where the file can have it, or leave out --encoder.",
            )
        codec = self.codec_of(KINDS[suffix])
        if self.crf is None:
            return
        if codec.crf is None:
            raise UsageError(f"{name} has no CRF, so --crf would do nothing.", "Leave out --crf.")
        if not 0 <= self.crf <= codec.most_crf:
            raise UsageError(
                f"{name} has no CRF of {shown(self.crf)}.",
                f"Use --crf 0 (best) to {codec.most_crf}; {codec.crf} is the default.",
            )


def usable(quality: Quality, kind: Kind, progress: Progress) -> Quality:
    """`quality`, without NVENC where it cannot be opened, of which a note tells. Call before the record is
    made: it names the encoder.
    """
    if quality.encoder is None:
        return quality
    try:
        quality.encoding(kind, *PROBE).open()
    except (av.FFmpegError, ValueError) as error:  # a ValueError: this build of PyAV lacks it
        name = quality.codec_of(kind).encoder
        text = (
            f"{name} cannot be opened here, so the CPU encodes. It needs an NVIDIA GPU with NVENC, which an "
            "H100 or H200 has not, and its driver."
        )
        progress(Note(text, "no_nvenc", {"encoder": name, "reason": str(error)}))
        return replace(quality, encoder=None)
    return quality


@dataclass(frozen=True)
class Encoding:
    """All that decides about the encoded pictures, except the pictures."""

    encoder: str
    width: int
    height: int
    rate: Fraction  # frames per second
    options: Mapping[str, str] = field(default_factory=dict)
    pixels: str = "yuv420p"

    def open(self) -> VideoStream:
        """A new encoder. Its packets count time in frames, and its stream is a template for muxers."""
        os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 has no other way to print errors alone
        gc.collect()  # PyAV's containers and streams hold each other, so encoders of earlier windows live on
        nowhere = av.open("-", "w", format="null")
        stream = nowhere.add_stream(self.encoder, rate=self.rate, options=dict(self.options))
        assert isinstance(stream, VideoStream), f"{self.encoder} encodes no pictures"
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, self.pixels
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
