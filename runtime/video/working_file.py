"""A video file that grows by pieces. Each piece plays once it is written, so a killed job leaves a video.

An encoder gives packets late and in decoding order. Pieces hold pictures without a gap in display order. A
later process can go on from a known end (`Settled`). `join` makes the final file out of the pieces, without
encoding: it has one index, exact times, and the sound's packets before the first picture.
"""

import hashlib
import os
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, lcm
from pathlib import Path
from typing import Any

import av
from av.packet import Packet
from av.stream import Stream
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from trt_wan.runtime.video.kinds import Kind
from trt_wan.runtime.video.pieces import (
    MATROSKA,
    MOST_DELAY,
    Packets,
    add_stream,
    codec_delay,
    header,
    is_mp4,
    mux,
    piece,
    set_times,
)
from trt_wan.runtime.video.sound import Sound, seconds

PROBE = 65_536  # bytes, written and dropped to test that the file can grow
CHUNK = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class Settled:
    """The end of a working file, from which another process can go on. Its pictures need no later packet."""

    name: str  # the file's
    size: int  # bytes
    sha256: str  # for these bytes
    pictures: int
    pieces: int
    delay: int  # frames, see WorkingFile
    has_sound: bool
    codec_delay: str  # seconds, as a fraction


class WorkingFile:
    """Raises OSError where the disk fails. The file then ends with its last whole piece."""

    def __init__(
        self,
        path: Path,
        kind: Kind,
        rate: Fraction,
        video: VideoStream,
        sound: Sound | None,
        settled: Settled | None = None,
        comment: str = "",
    ) -> None:
        """Creates `path`, which must not exist, or goes on from `settled`, whose bytes it must begin with.

        `video` is a template for streams (Encoding.open). `comment` is for the metadata.
        """
        self.path, self.rate, self._comment = path, rate, comment
        self.pictures = 0
        self._muxer, self._video, self._sound = kind.muxer, video, sound
        self._codec_delay = Fraction(0)  # seconds of sound that a Matroska header hides
        self._early: Packets = []
        self._has_sound = False  # sound can begin after the last picture
        self._delay = 0  # frames that the decoding order has run ahead of the display so far
        self._pieces = 0
        self._end = 0
        self._digest = hashlib.sha256()
        if settled is not None:
            self.pictures, self._pieces = settled.pictures, settled.pieces
            self._delay, self._has_sound = settled.delay, settled.has_sound
            self._codec_delay = Fraction(settled.codec_delay)
            self._digest = beginning(path, settled.size)
        self._file = path.open("xb" if settled is None else "r+b", buffering=0)
        try:
            if settled is None:
                self._file.write(bytes(PROBE))
            self._cut(0 if settled is None else settled.size)
        except BaseException:
            self._file.close()
            if settled is None:
                path.unlink(missing_ok=True)
            raise

    def append(self, pictures: Packets, sound: Packets) -> None:
        """`pictures` are the next in decoding order; their pts are their numbers. Without any, only sound is
        added.
        """
        delays = [k - (picture.pts or 0) for k, picture in enumerate(pictures, self.pictures)]
        self._delay = max([self._delay, *delays])
        assert self._delay <= MOST_DELAY, f"a delay of {self._delay} frames"
        self._begin(pictures)
        sound = [*self._early, *sound]
        if pictures or sound:
            self._write(self._piece(pictures, sound))
            self._early = []
        self._has_sound = self._has_sound or bool(sound)
        self.pictures += len(pictures)

    def settled(self) -> Settled:
        """The present end. Call after `sync`, when the encoder holds nothing back."""
        return Settled(
            self.path.name,
            self._end,
            self._digest.hexdigest(),
            self.pictures,
            self._pieces,
            self._delay,
            self._has_sound,
            str(self._codec_delay),
        )

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def join(self, target: Path) -> None:
        """Writes the final video to `target`. Its sound ends with the last picture. Raises OSError."""
        end = self.pictures / self.rate - self._codec_delay  # where the sound ends, in seconds
        options = self._mp4_options() if is_mp4(self._muxer) else MATROSKA
        with (
            # Absolute paths, because ffmpeg takes `a:b.mp4` for a protocol called `a`.
            av.open(str(self.path.absolute())) as source,
            av.open(str(target.absolute()), "w", format=self._muxer, options=options) as output,
        ):
            output.metadata.update({"comment": self._comment} if self._comment else {})
            templates = [*source.streams][: 2 if self._has_sound else 1]
            streams = [add_stream(output, self._muxer, stream) for stream in templates]
            codec = streams[0].codec_context
            assert isinstance(codec, VideoCodecContext), "the first stream has the pictures"
            codec.framerate = self.rate
            if self._sound is not None and self._has_sound and is_mp4(self._muxer):
                # Its edit list hides them. ffmpeg heeds none in a file of fragments, so they are not there.
                mux(output, streams[1], self._sound.before)
            pictures = 0
            for packet in source.demux():
                if packet.pts is None:
                    continue
                if packet.stream_index == 0:
                    number = round(packet.pts * packet.time_base * self.rate)
                    set_times(packet, number, pictures - self._delay, 1 / self.rate)
                    packet.duration = 1
                    pictures += 1
                else:
                    left = end // packet.time_base - packet.pts
                    if left <= 0:
                        continue
                    packet.duration = min(packet.duration or left, left)
                mux(output, streams[packet.stream_index], [packet])
        assert pictures == self.pictures, f"{pictures} of {self.pictures} pictures in the final file"

    def _mp4_options(self) -> dict[str, str]:
        """Units of time in which pictures and sound have exact lengths."""
        units = self.rate.numerator * ceil(10_000 / self.rate.numerator)  # per second
        common = lcm(units, self._sound.stream.rate) if self._sound is not None else units
        return {
            "movflags": "+faststart",
            "video_track_timescale": str(units),
            "movie_timescale": str(common if common < 2**31 else units),
        }

    def close(self) -> None:
        self._file.close()

    def _begin(self, pictures: Packets) -> None:
        """Writes the header, if there is none. Sound that it hides comes with the first piece of sound."""
        if self._end or not pictures:
            return
        first: dict[Stream, Packet[Any]] = {self._video: pictures[0]}
        if self._sound is not None and self._sound.first is not None:
            first[self._sound.stream] = self._sound.first
        made = header(self._muxer, first, self._comment)
        self._write(made)
        if self._sound is not None and not is_mp4(self._muxer):  # for an mp4 see join
            self._codec_delay = codec_delay(self._muxer, made)
            self._early = [p for p in self._sound.before if seconds(p) >= -self._codec_delay]

    def _piece(self, pictures: Packets, sound: Packets) -> memoryview:
        streams: dict[Stream, Packets] = {self._video: pictures}
        if self._sound is not None and sound:
            streams[self._sound.stream] = sound
        self._pieces += 1
        return piece(self._muxer, streams, self.rate, self.pictures, self._pieces)

    def _write(self, data: memoryview) -> None:
        left = data
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._cut(self._end)
            raise
        self._end += len(data)
        self._digest.update(data)

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        self._file.seek(end)
        self._end = end


def beginning(path: Path, size: int) -> "hashlib._Hash":
    """The digest of the first `size` bytes of a file, to be continued. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, CHUNK))):
            digest.update(chunk)
            size -= len(chunk)
    return digest
