"""Finished videos one after another as one video. Pictures are copied. Sound is encoded anew: coded sound
cannot be cut at a picture's time.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from trt_wan.errors import InputError, UsageError, with_commands
from trt_wan.runtime.video.container import measure, open_container, remake, sound_stream, video_stream
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.pieces import MOST_DELAY, set_times
from trt_wan.runtime.video.sound import Sound, audio_encoder, first_time
from trt_wan.runtime.video.target import (
    check_target,
    claimed,
    explained,
    joining,
    partial_names,
    refuse_inputs,
    sync,
)
from trt_wan.runtime.video.working_file import WorkingFile

PIECE = 64  # packets that are written at once


def join_videos(parts: Sequence[Path], output: Path, overwrite: bool = False) -> tuple[int, Fraction]:
    """Writes `output`, whose kind of file must be one that can have the parts' codec. Returns the number of
    frames, and their rate.

    Raises InputError for parts of different sizes, rates or settings of the encoder.
    """
    check_target(output, overwrite)
    refuse_inputs(output, parts)
    kind = KINDS[output.suffix.lower()]
    if kind.is_gif:
        raise UsageError("A GIF cannot have the pictures of videos.", "Write an .mp4.")
    with ExitStack() as stack:
        stack.enter_context(claimed(output))
        found = [measure(part) for part in parts]
        opened = [stack.enter_context(open_container(part)) for part in parts]
        streams = [video_stream(source, part) for source, part in zip(opened, parts, strict=True)]
        _require_alike(
            parts, [(*stream_form(stream), each.rate) for stream, each in zip(streams, found, strict=True)]
        )
        codec = streams[0].codec_context.codec.canonical_name
        if codec not in kind.codecs:
            raise UsageError(
                f"A file that ends in {output.suffix} cannot have the codec {codec}.",
                f"Give it the ending of {parts[0].name}.",
            )
        rate, counts = found[0].rate, [len(each.used) for each in found]
        ends = [Fraction(sum(counts[: k + 1])) / rate for k in range(len(parts))]
        sound = JoinedSound.of_parts(list(zip(parts, ends, strict=True)), kind.sound)
        with explained(output):
            partial = next(path for path in partial_names(output) if not path.exists())
            file = WorkingFile(partial, kind, rate, streams[0], sound)
            stack.callback(partial.unlink, missing_ok=True)
            stack.callback(file.close)
            for source, stream in zip(opened, streams, strict=True):
                append(file, numbered(source, stream, file.pictures, rate), sound)
            target = joining(partial)
            stack.callback(target.unlink, missing_ok=True)
            file.join(target)
            sync(target)
            os.replace(target, output.resolve())
    return sum(counts), rate


def stream_form(stream: VideoStream) -> tuple[Any, ...]:
    codec = stream.codec_context
    return codec.codec.canonical_name, codec.width, codec.height, codec.pix_fmt, bytes(codec.extradata or b"")


OTHERS = (
    *("another codec", "another width", "another height", "another pixel format"),
    *("other settings of the encoder", "another rate"),
)


def _require_alike(parts: Sequence[Path], forms: Sequence[tuple[Any, ...]]) -> None:
    for part, form in zip(parts, forms, strict=True):
        if different := [name for name, a, b in zip(OTHERS, forms[0], form, strict=True) if a != b]:
            raise InputError(
                f"{part} cannot follow {parts[0]}: it has {' and '.join(different[:2])}.",
                "Make both with the same --size, --rate, --codec and --crf.",
            )


def numbered(
    source: InputContainer, stream: VideoStream, first: int, rate: Fraction
) -> Iterator["Packet[Any]"]:
    """The packets of a file in decoding order. Their pts are their numbers in display order, from `first`."""
    packets = [p for p in source.demux(stream) if p.pts is not None and not p.is_discard]
    start = min(packet.pts or 0 for packet in packets)
    for place, packet in enumerate(packets):
        assert packet.pts is not None
        number = round((packet.pts - start) * packet.time_base * rate)
        if place - number > MOST_DELAY:
            raise InputError(
                f"{source.name} cannot be joined: its pictures do not have the times of their order.",
                with_commands("If a player shows it, convert the file:", remake(Path(source.name))),
            )
        set_times(packet, first + number, None, 1 / rate)
        yield packet


def append(file: WorkingFile, packets: Iterable["Packet[Any]"], sound: Sound | None) -> None:
    """Appends numbered packets, with the sound up to their end, in pieces without a gap in display order."""
    waiting: list[Packet[Any]] = []
    latest = -1

    def write() -> None:
        end = (file.pictures + len(waiting)) / file.rate
        file.append(waiting, [] if sound is None else sound.until(end))
        waiting.clear()

    for packet in packets:
        waiting.append(packet)
        latest = max(latest, packet.pts or 0)
        if len(waiting) >= PIECE and latest == file.pictures + len(waiting) - 1:
            write()
    if waiting:
        write()


class JoinedSound(Sound):
    """The sound of each part up to its end; silence in a part that has none."""

    @classmethod
    def of_parts(cls, parts: Sequence[tuple[Path, Fraction]], encoder: str) -> "JoinedSound | None":
        """`parts` with the times of their ends. None where no part has sound."""
        for path, _ in parts:
            with av.open(str(path.absolute()), metadata_errors="ignore") as source:
                if (stream := sound_stream(source)) is not None:
                    return cls(path, parts, audio_encoder(encoder, stream))
        return None

    def __init__(self, path: Path, parts: Sequence[tuple[Path, Fraction]], stream: Any) -> None:
        self.path, self.stream = path, stream
        self._packets = self._of(parts)
        self.first = self._next = self._advance()
        self.before = self.until(Fraction(0))

    def close(self) -> None:
        """Files are closed when they are read."""

    def _of(self, parts: Sequence[tuple[Path, Fraction]]) -> Iterator["Packet[Any]"]:
        codec, at = self.stream.codec_context, 0
        for path, end in parts:
            for samples in self._samples(path, round(end * codec.sample_rate) - at):
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=codec.layout.name)
                frame.sample_rate, frame.pts, frame.time_base = (
                    codec.sample_rate,
                    at,
                    Fraction(1, codec.sample_rate),
                )
                at += samples.shape[1]
                yield from self._encode(frame)
        yield from self.stream.encode(None)

    def _encode(self, frame: av.AudioFrame) -> Iterator["Packet[Any]"]:
        codec = self.stream.codec_context
        if codec.format.name == "fltp":
            yield from self.stream.encode(frame)
            return
        for made in av.AudioResampler(codec.format, codec.layout, codec.sample_rate).resample(frame):
            yield from self.stream.encode(made)

    def _samples(self, path: Path, count: int) -> Iterator[NDArray[Any]]:
        """Exactly `count` samples of a part [channels, n], from the time of its first picture on."""
        codec, at = self.stream.codec_context, 0
        silence = np.zeros((codec.layout.nb_channels, count), np.float32)
        with av.open(str(path.absolute()), metadata_errors="ignore") as source:
            if (stream := sound_stream(source)) is not None:
                zero = first_time(source)
                resampler = av.AudioResampler("fltp", codec.layout, codec.sample_rate)
                for decoded in source.decode(stream):
                    for frame in resampler.resample(decoded):
                        start = round(
                            (Fraction(frame.pts or 0) * (frame.time_base or 0) - zero) * codec.sample_rate
                        )
                        samples = frame.to_ndarray()[:, max(at - start, 0) :]
                        start = max(start, at)
                        if start > at and (gap := silence[:, at : min(start, count)]).shape[1]:
                            yield gap
                        if (samples := samples[:, : max(count - start, 0)]).shape[1]:
                            yield samples
                        at = max(at, min(start + samples.shape[1], count))
        if at < count:
            yield silence[:, at:]
