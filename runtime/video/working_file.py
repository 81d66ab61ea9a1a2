"""A video file that grows by pieces. Each piece plays once it is written, so a killed job leaves a video.

An encoder gives packets late and in decoding order. Pieces hold pictures without a gap in display order. The
last pictures of a finished window, which are still inside the encoder, are encoded once more into a tail: a
piece that is hidden when their own packets have followed. `join` makes the final file out of the pieces,
without encoding: it has one index, exact times, and the sound's packets before the first picture.
"""

import os
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
    hiding,
    is_mp4,
    mux,
    piece,
    set_times,
)
from trt_wan.runtime.video.sound import Sound, seconds

PROBE = 65_536  # bytes, written and dropped to test that the file can grow


class WorkingFile:
    """Raises OSError where the disk fails. The file then ends with its last whole piece."""

    def __init__(
        self, path: Path, kind: Kind, rate: Fraction, video: VideoStream, sound: Sound | None
    ) -> None:
        """Creates `path`, which must not exist. `video` is a template for streams (Encoding.open)."""
        self.path, self.rate = path, rate
        self.pictures = 0  # in the file, without the tail
        self.shown = 0  # in the file, with the tail
        self._muxer, self._video, self._sound = kind.muxer, video, sound
        self._codec_delay = Fraction(0)  # seconds of sound that a Matroska header hides
        self._early: Packets = []
        self._has_sound = False  # sound can begin after the last picture
        self._delay = 0  # frames that the decoding order has run ahead of the display so far
        self._hide_tail: list[tuple[int, bytes]] = []  # positions, and the bytes to write there
        self._pieces = 0
        self._end = 0
        self._file = path.open("xb", buffering=0)
        try:
            self._write(memoryview(bytes(PROBE)))
            self._cut(0)
        except BaseException:
            self.delete()
            raise

    def append(self, pictures: Packets, sound: Packets) -> None:
        """`pictures` are the next in decoding order; their pts are their numbers. They hide the tail, and are
        no fewer than its pictures. Without any, only sound is added.
        """
        assert not pictures or self.pictures + len(pictures) >= self.shown, "the tail is longer"
        delays = [k - (picture.pts or 0) for k, picture in enumerate(pictures, self.pictures)]
        self._delay = max([self._delay, *delays])
        assert self._delay <= MOST_DELAY, f"a delay of {self._delay} frames"
        self._begin(pictures)
        sound = [*self._early, *sound]
        if pictures or sound:
            self._write(self._piece(pictures, sound))
            self._early = []
        self._has_sound = self._has_sound or bool(sound)
        if pictures:
            self.pictures += len(pictures)
            self._replace_tail(self.pictures)

    def append_tail(self, pictures: Packets) -> None:
        """`pictures` are copies of the next ones, whose own packets come later. They hide the tail before."""
        self._begin(pictures)
        made, start = self._piece(pictures, ()), self._end
        self._write(made)
        self._replace_tail(self.pictures + len(pictures))
        self._hide_tail = [(start + position, hidden) for position, hidden in hiding(self._muxer, made)]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def join(self, target: Path) -> None:
        """Writes the final video to `target`. Its sound ends with the last picture. Raises OSError."""
        end = self.pictures / self.rate - self._codec_delay  # of the sound, in seconds
        options = self._mp4_options() if is_mp4(self._muxer) else MATROSKA
        with (
            # Absolute paths, because ffmpeg takes `a:b.mp4` for a protocol called `a`.
            av.open(str(self.path.absolute())) as source,
            av.open(str(target.absolute()), "w", format=self._muxer, options=options) as output,
        ):
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

    def delete(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _begin(self, pictures: Packets) -> None:
        """Writes the header, if there is none. Sound that it hides comes with the first piece of sound."""
        if self._end or not pictures:
            return
        first: dict[Stream, Packet[Any]] = {self._video: pictures[0]}
        if self._sound is not None and self._sound.first is not None:
            first[self._sound.stream] = self._sound.first
        made = header(self._muxer, first)
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

    def _replace_tail(self, shown: int) -> None:
        for position, hidden in self._hide_tail:
            self._file.seek(position)
            self._file.write(hidden)
        self._file.seek(self._end)
        self._hide_tail, self.shown = [], shown

    def _write(self, data: memoryview) -> None:
        left = data
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._cut(self._end)
            raise
        self._end += len(data)

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        self._file.seek(end)
        self._end = end
