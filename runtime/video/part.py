"""A part of a video, such as a window: pictures with an encoder and a thread of their own.

Parts are encoded side by side, and their packets go to the working file in order: a part's thread appends
once the part before is on the disk. Until then its packets are in memory.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import av
from av.packet import Packet
from av.video.stream import VideoStream

from trt_wan.runtime.video.pieces import Packets
from trt_wan.runtime.video.working_file import Settled, WorkingFile
from trt_wan.runtime.video.writer_thread import Beside

# Parts that are encoded at once. x264 takes 2.9 s for a window of noise at 832x480, and four GPUs compute one
# in 2.4 s: two encoders are done in time, and more would only take memory.
PARTS = 2
# Pictures that may wait for a part's encoder: 80 in both parts, about a window. 4:2:0 takes 1.5 bytes a
# pixel, in all 48 MB at 832x480 and 111 MB at 1280x720; ProRes (4:2:2 of 10 bits) takes 4 bytes.
WAITING = 40

Then = Callable[[Settled], object]


class Dropped(Exception):
    """A part lacks pictures, so that none can come after it."""


class Part:
    """`put` its pictures, then `end` it. Only then may the next part begin, whose `before` it is."""

    def __init__(
        self,
        file: WorkingFile,
        open: Callable[[], VideoStream],
        first: int,
        before: "Part | None",
        waiting: int,
    ) -> None:
        """`open` makes the encoder. `first` is the number of the first picture. At most `waiting` pictures
        wait for the encoder.
        """
        self._file, self._open, self._before = file, open, before
        self._encoder: VideoStream | None = None
        self._coded: list[Packet[Any]] = []  # pictures that no piece has, in decoding order
        self._heard: list[Packet[Any]] = []  # sound that no piece has
        self._next = first  # number of pictures in earlier parts and in pieces
        self._pieces: deque[tuple[Packets, Packets]] = deque()  # that the file lacks
        self._then: Then | None = None
        self._thread = Beside(self._use, waiting)
        self._thread.start()

    def put(self, picture: av.VideoFrame, sound: Packets) -> None:
        """Waits for room. `sound` is heard up to the end of this picture. Raises as `check`."""
        self._thread.put((picture, sound))

    def end(self, then: Then | None) -> None:
        """No more pictures come. The part's thread calls `then` when they are on the disk."""
        self._then = then
        self._thread.end()

    def drop(self) -> None:
        """Pictures that wait are not encoded. If there are any, the part fails with Dropped."""
        self._thread.drop()

    def join(self) -> None:
        """Waits until an ended part and all before it are on the disk, or have failed."""
        self._thread.join()

    def check(self) -> None:
        """Raises the error of this part or of one before it."""
        self._thread.check()

    def _use(self, items: Iterator[tuple[av.VideoFrame, Packets]]) -> None:
        for picture, sound in items:
            try:
                self._encoder = self._encoder or self._open()
                self._coded += self._encoder.encode(picture)
            except BaseException:
                with suppress(Exception):
                    self._finish()  # earlier pictures stay
                raise
            self._heard += sound
            if len(self._coded) >= self._file.rate:  # a second
                self._cut()
            if self._before is None or self._before.is_over:
                self._append()
        self._finish()
        if self._thread.has_dropped:
            raise Dropped
        if self._then is not None:
            self._then(self._file.settled())

    @property
    def is_over(self) -> bool:
        return self._thread.is_over

    def _finish(self) -> None:
        """The encoder's last packets go to the disk."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            self._coded += encoder.encode(None)
        self._cut()
        self._append()
        self._file.sync()

    def _cut(self) -> None:
        """Makes a piece of the pictures up to the first gap in display order, and the sound."""
        latest, ready = self._next - 1, 0
        for count, packet in enumerate(self._coded, 1):
            assert packet.pts is not None
            latest = max(latest, packet.pts)
            if latest == self._next + count - 1:
                ready = count
        if ready:
            self._pieces.append((self._coded[:ready], self._heard))
            self._next += ready
            self._coded, self._heard = self._coded[ready:], []

    def _append(self) -> None:
        """Writes the pieces, after the part before. After a gap nothing is written: raises its error."""
        if self._before is not None:
            self._before.join()
            self._before.check()
            self._before = None
        while self._pieces:
            self._file.append(*self._pieces.popleft())
