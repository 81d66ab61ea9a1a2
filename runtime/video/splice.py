"""A finished video with some of its frames from other files. All other packets, and the sound, are copied.

It can be cut where a key frame begins that no earlier or later packet refers over: our writer begins every
window with one (writer.py).
"""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

from av.audio.stream import AudioStream
from av.packet import Packet

from trt_wan.errors import InputError
from trt_wan.runtime.video.container import open_container, video_stream
from trt_wan.runtime.video.join import append, numbered, stream_form
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.pieces import codec_delay, is_mp4, set_times
from trt_wan.runtime.video.sound import Sound, seconds
from trt_wan.runtime.video.target import sync
from trt_wan.runtime.video.working_file import WorkingFile

HEADER = 1 << 20  # bytes of a Matroska file in which its header ends
NANOSECOND = Fraction(1, 10**9)
WHOLE = "Name the file as trt-wan wrote it, or render all of it anew: leave out --redo."


class _Same(Sound):
    """The packets of a finished video. Matroska has their times in milliseconds, and not all durations."""

    def _copied(self) -> "Iterator[Packet[AudioStream]]":
        muxer = KINDS[self.path.suffix.lower()].muxer
        if is_mp4(muxer):
            yield from super()._copied()
            return
        with self.path.open("rb") as file:
            hidden = codec_delay(muxer, memoryview(file.read(HEADER)))
        codec = self._input.codec_context
        for packet in self._demuxed():
            if seconds(packet) < -hidden:  # by rounding: the header hides all that is earlier
                set_times(packet, *2 * (round(-hidden / NANOSECOND),), NANOSECOND)
            if not packet.duration and codec.frame_size:
                packet.duration = round(Fraction(codec.frame_size, codec.sample_rate) / packet.time_base)
            yield packet


def require_cuts(video: Path, places: Collection[int], rate: Fraction) -> None:
    """Raises InputError unless `video` can be cut before the frames `places`."""
    with open_container(video) as source:
        latest, keys, seen = -1, set[int](), set[int]()
        for packet in numbered(source, video_stream(source, video), 0, rate):
            number = packet.pts or 0
            if packet.is_keyframe and latest < number:
                keys.add(number)
            if number < latest:  # shown before a frame that came earlier: no cut between them
                keys -= set(range(number + 1, latest + 1))
            latest = max(latest, number)
            seen.add(number)
    for place in sorted(places):
        if place not in keys and place != len(seen):
            raise InputError(
                f"{video} was encoded by another program: frame {place} begins a window and is no key frame.",
                WHOLE,
            )


def require_same_encoder(video: Path, sample: Path) -> None:
    """Raises InputError unless a player that has read the header of `video` can decode `sample`."""
    with open_container(video) as one, open_container(sample) as other:
        if stream_form(video_stream(one, video)) != stream_form(video_stream(other, sample)):
            raise InputError(
                f"{video} was encoded by another program, or another version of the encoder: its packets and "
                "new ones cannot be in one file.",
                WHOLE,
            )


def splice(
    video: Path, parts: Mapping[int, Path], output: Path, folder: Path, rate: Fraction, comment: str
) -> None:
    """Writes `output`, which may be `video`: with the frames of each of `parts` from its number on. Works in
    `folder`, on the disk of `output`. `require_cuts` and `require_same_encoder` have passed.
    """
    kind = KINDS[output.suffix.lower()]
    target = folder / f"joined{output.suffix}"
    with ExitStack() as stack:
        opened = {path: stack.enter_context(open_container(path)) for path in (video, *parts.values())}
        streams = {path: video_stream(container, path) for path, container in opened.items()}
        if sound := _Same.of(video, kind):
            stack.callback(sound.close)
        working = folder / f"spliced{output.suffix}"
        file = WorkingFile(working, kind, rate, streams[video], sound, comment=comment)
        stack.callback(file.close)

        def packets() -> Iterator["Packet[Any]"]:
            left, end = dict(parts), 0
            for packet in numbered(opened[video], streams[video], 0, rate):
                number = packet.pts or 0
                if part := left.pop(number, None):
                    for new in numbered(opened[part], streams[part], number, rate):
                        end = max(end, (new.pts or 0) + 1)
                        yield new
                elif number >= end:
                    yield packet

        append(file, packets(), sound)
        file.join(target)
        sync(target)
    os.replace(target, output.resolve())
