"""The sound of the finished video: another file's packets, copied if players accept them, else encoded."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
from av.audio.stream import AudioStream
from av.bitstream import BitStreamFilterContext
from av.codec.context import Flags
from av.container import InputContainer
from av.packet import Packet

from trt_wan.errors import InputError, with_commands
from trt_wan.runtime.video.container import sound_stream
from trt_wan.runtime.video.kinds import Kind

SOUND_BIT_RATE = 192_000  # for sound that must be encoded again
SOUND_RATES = {
    "aac": frozenset({8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000}),
    "libopus": frozenset({8000, 12000, 16000, 24000, 48000}),
}


def require_sound(path: Path) -> None:
    """Raises InputError for a file without sound."""
    with _readable(path), av.open(str(path.absolute()), metadata_errors="ignore") as source:
        if sound_stream(source) is None:
            raise without_sound(path)


def without_sound(path: Path, start: Fraction = Fraction(0)) -> InputError:
    after = f" after {float(start):g} s, where the clip starts" if start else ""
    return InputError(f"{path} has no sound{after}.", "Leave out --audio, or name a file with sound.")


class Sound:
    """Packets for the output's sound stream, in order of time, up to the time of the pictures.

    `stream` is a template for streams, and `first` the first packet. `before` has the packets that start
    before the first picture.
    """

    stream: AudioStream
    first: "Packet[AudioStream] | None"
    before: "list[Packet[AudioStream]]"

    @classmethod
    def of(cls, path: Path, kind: Kind, start: Fraction = Fraction(0)) -> Self | None:
        """The sound from `start` on, in seconds after the file's first picture; None where it has none."""
        with _readable(path):
            source = av.open(str(path.absolute()), metadata_errors="ignore")
            stream = sound_stream(source)
            if stream is not None and (sound := cls(path, source, stream, kind, start)).first is not None:
                return sound
            source.close()
            return None

    def __init__(
        self, path: Path, source: InputContainer, stream: AudioStream, kind: Kind, start: Fraction
    ) -> None:
        self.path, self._source, self._input = path, source, stream
        self._zero = first_time(source) + start
        copied = self._input.codec_context.codec.canonical_name in kind.copied
        self.stream = self._input if copied else audio_encoder(kind.sound, self._input)
        self._packets = self._copied() if copied else self._encoded()
        self.first = self._next = self._advance()
        self.before = self.until(Fraction(0))

    def until(self, end: Fraction) -> "list[Packet[AudioStream]]":
        """The next packets, those that start before `end`, in seconds."""
        packets = []
        while self._next is not None and seconds(self._next) < end:
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
        for packet in self._demuxed():
            assert packet.pts is not None
            shift = round(self._zero / packet.time_base)
            pts, duration = packet.pts - shift, packet.duration or 0
            whole = round(Fraction(size, rate) / packet.time_base) if rate else 0
            if pts < 0 and duration > whole > 0:
                # mp4 stretches a packet that starts before the picture. Its end stays in place.
                pts, duration = pts + duration - whole, whole
            packet.pts = packet.dts = pts
            packet.duration = duration
            # One packet before the start is kept: a codec with overlapping packets needs it for the next one.
            if pts + 2 * duration > 0:
                yield packet

    def _demuxed(self) -> "Iterator[Packet[AudioStream]]":
        codec = self._input.codec_context
        # AAC of a transport stream has headers of its own, which the muxer for fragments does not remove.
        wrapped = codec.codec.canonical_name == "aac" and not codec.extradata
        unwrap = BitStreamFilterContext("aac_adtstoasc", self._input) if wrapped else None
        for packet in self._source.demux(self._input):
            if packet.pts is None:
                continue
            time_base = packet.time_base
            for made in [packet] if unwrap is None else unwrap.filter(packet):
                made.time_base = time_base
                if made.has_sidedata("new_extradata"):
                    self.stream = _with_extradata(self._input, bytes(made.get_sidedata("new_extradata")))
                yield made

    def _encoded(self) -> "Iterator[Packet[AudioStream]]":
        for frame in self._source.decode(self._input):
            if frame.pts is None or frame.time_base is None:
                continue
            frame.pts -= round(self._zero / frame.time_base)
            if frame.pts * frame.time_base + Fraction(frame.samples, frame.sample_rate) > 0:
                yield from self.stream.encode(frame)
        yield from self.stream.encode(None)


def audio_encoder(name: str, source: AudioStream) -> AudioStream:
    nowhere = av.open("-", "w", format="null")
    rate = source.rate if source.rate in SOUND_RATES[name] else 48_000
    stream = nowhere.add_stream(name, rate=rate, bit_rate=SOUND_BIT_RATE)
    assert isinstance(stream, AudioStream), f"{name} encodes no sound"
    stream.codec_context.layout = "mono" if source.channels == 1 else "stereo"
    stream.codec_context.flags |= Flags.global_header  # see Encoding.open
    nowhere.start_encoding()
    return stream


def _with_extradata(stream: AudioStream, extradata: bytes) -> AudioStream:
    nowhere = av.open("-", "w", format="null")
    made = nowhere.add_stream_from_template(stream)
    made.codec_context.extradata = extradata
    nowhere.start_encoding()
    return made


def seconds(packet: "Packet[Any]") -> Fraction:
    assert packet.pts is not None
    return packet.pts * packet.time_base


def first_time(source: InputContainer) -> Fraction:
    """The time of the first picture, or of the first sample in a file without pictures, in seconds."""
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
            with_commands(
                "Encode it again:",
                f"ffmpeg -i {shlex.quote(str(path))} -c:v copy -c:a aac {shlex.quote(str(fixed))}",
            ),
        ) from error
