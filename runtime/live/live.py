"""A live source to an output: one job whose clip has no known length.

`go_live` starts the source, and the job takes the frames of each window when it is ready for them. Windows
go on from each other as those of a finite clip do: if nothing is dropped, the frames are the same.

The output has the source's rate. Where frames were dropped, the frame before them stays, so that motion keeps
its time.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from threading import Lock
from typing import Protocol

import cv2
import numpy as np

from trt_wan.errors import InputError, Stopped, tell_with
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.events import Event, LiveWindow, Note, Progress, WindowDone, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Job
from trt_wan.runtime.live.intake import Arrived, Intake, LiveFrame, Pictures
from trt_wan.runtime.live.outputs import Output
from trt_wan.runtime.live.sources import Source
from trt_wan.runtime.pipeline import ShouldStop, to_pixels
from trt_wan.runtime.render import ROOM, Streaming
from trt_wan.runtime.video.arriving import ArrivingClip
from trt_wan.runtime.video.clips import FACE_SIZE, Clips
from trt_wan.runtime.video.writer_thread import Beside

STOPPED = "stopped"  # the reason of an end that was asked for
CLIPS = ("pose", "face", "background", "mask")


@dataclass(frozen=True)
class Went:
    """The end of a live job. Latencies are in seconds."""

    frames_in: int
    frames_out: int
    dropped: int
    windows: int
    latency_median: float
    latency_worst: float
    seconds: float  # from the start of the source to the last frame
    ended: str  # why


class ArrivingClips:
    """The clips of a job, filled from an intake. `taken` has the arrivals of the frames, in order, for the
    writer.
    """

    def __init__(
        self, job: Job, reference: Pixels, size: tuple[int, int], names: Sequence[str], intake: Intake
    ) -> None:
        """`names` are those of the clips: pose, face, background, mask."""
        self.intake, self.taken = intake, deque[Arrived]()
        self._begin: Callable[[], None] | None = None
        self._look: Callable[[], None] = lambda: None
        self._count = 0
        paths = {name: getattr(job.inputs, name) or job.inputs.reference for name in names}
        self._clips = {
            name: ArrivingClip(
                path, *((FACE_SIZE, FACE_SIZE) if name == "face" else size), intake.rate, job.history
            )
            for name, path in paths.items()
        }
        pose, face, background, mask = (self._clips.get(name) for name in CLIPS)
        two_windows = 2 * job.window - job.overlap  # so it is planned as a video that goes on
        sizes = (*size, two_windows, intake.rate)
        self.clips = Clips(reference, pose, face, background, mask, *sizes, coming=self._until)

    def watch(self, begin: Callable[[], None], look: Callable[[], None]) -> None:
        """`begin` is called when frames are awaited for the first time, `look` while they are awaited."""
        self._begin, self._look = begin, look

    def _until(self, frames: int) -> int:
        begin, self._begin = self._begin, None
        if begin is not None:
            begin()
        for frame in self.intake.take(frames - self._count, self._look):
            for name, clip in self._clips.items():
                clip.add(frame.pictures[name])
            self.taken.append(frame.arrived)
            self._count += 1
        if not self._count and self.intake.why_ended == STOPPED:
            raise Stopped("Stopped before the first frame.")
        if not self._count:
            raise InputError("No frame came from the live source.", f"It said: {self.intake.why_ended}.")
        return self._count


class Feeding(Protocol):
    """As `Feed`; preprocess/live.py has the one for a camera's pictures."""

    def start(self, source: Source) -> None: ...

    def end(self, why: str, error: BaseException | None = None) -> None: ...


def go_live(
    job: Job,
    model: Streaming,
    clips: ArrivingClips,
    source: Source,
    feed: Feeding,
    output: Output,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
) -> Went:
    """Starts the source when the model is ready for the first frame. Runs until the source ends, or
    `should_stop`: then frames that have come are finished first. `feed` puts the source's pictures into the
    intake as those of the clips. The output is finished; when the job fails it is left with the finished
    frames, and the error says where. Raises TrtWanError, Stopped before the first frame.
    """
    intake, began = clips.intake, list[float]()
    written = _Written(clips, output, intake.clock)

    def begin() -> None:
        began.append(time.monotonic())
        written.begin()
        feed.start(source)

    def look() -> None:
        written_beside.check()
        output.check()
        if should_stop():
            source.stop()
            feed.end(STOPPED)

    def told(event: Event) -> None:
        written.tell(progress)
        if isinstance(event, WindowDone):
            written_beside.put(event)
        else:
            progress(event)
        look()

    clips.watch(begin, look)
    try:
        with Beside(written.write, ROOM) as written_beside:
            for piece in model.pieces(
                job,
                clips=clips.clips,
                progress=told,
                should_stop=lambda: False,
                begin_from=None,
                keep=None,
            ):
                written_beside.put(piece)
        output.finish()
        written.tell(progress)
    except BaseException as error:
        source.stop()
        feed.end(STOPPED)
        if (partial := output.abandon(keep=True, at_once=isinstance(error, KeyboardInterrupt))) is not None:
            tell_with(error, f"The finished frames are in {partial}.")
        raise
    why = intake.why_ended or STOPPED
    progress(Note(f"The live video is finished: {why}.", "live_ended"))
    return Went(
        intake.frames_in,
        len(written.latencies),
        intake.dropped,
        written.windows,
        round(median(written.latencies), 3),
        round(max(written.latencies), 3),
        round(time.monotonic() - began[0], 2),
        why,
    )


class Feed:
    """From the source to the intake, for pictures that are prepared already."""

    def __init__(self, intake: Intake, size: tuple[int, int] | None = None) -> None:
        """`size` is that of the video where the clips have another; faces stay as they are."""
        self.intake, self._size = intake, size
        self._lock, self._ended = Lock(), False

    def start(self, source: Source) -> None:
        source.start(self._deliver, self.end)

    def end(self, why: str, error: BaseException | None = None) -> None:
        """Takes no more frames. Only the first call counts."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self.intake.end(why, error)

    def _deliver(self, seconds: float, pictures: Callable[[], Pictures]) -> None:
        with self._lock:
            if not self._ended and (arrived := self.intake.admit(seconds)) is not None:
                self.intake.put(LiveFrame(arrived, self._fitted(pictures())))

    def _fitted(self, pictures: Pictures) -> Pictures:
        if (size := self._size) is None:
            return pictures
        scaled = {
            name: np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
            for name, picture in pictures.items()
            if name != "face"
        }
        return {**pictures, **scaled}


class _Written:
    """The writing thread's part: pictures go to the output, and their latencies are measured."""

    def __init__(self, clips: ArrivingClips, output: Output, clock: Callable[[], float]) -> None:
        self._clips, self._output, self._clock = clips, output, clock
        self._slot, self._before = -1, 0.0
        self.latencies: list[float] = []
        self.windows = 0
        self._told: deque[LiveWindow] = deque()

    def begin(self) -> None:
        """Call when the source starts."""
        self._before = self._clock()

    def write(self, items: Iterator[Array | WindowDone]) -> None:
        last: Pixels | None = None
        here: list[float] = []
        for item in items:
            if isinstance(item, WindowDone):
                self._window_done(here)
                here = []
                continue
            for picture in to_pixels(item):
                arrived = self._clips.taken.popleft()
                for _ in range(arrived.slot - self._slot - 1):
                    self._output.write(picture if last is None else last)
                self._output.write(picture)
                last, self._slot = picture, arrived.slot
                here.append(self._clock() - arrived.at)
                self.latencies.append(here[-1])
        if last is not None:
            for _ in range(self._clips.intake.slot - self._slot):
                self._output.write(last)

    def _window_done(self, latencies: Sequence[float]) -> None:
        self.windows += 1
        now, intake = self._clock(), self._clips.intake
        rate = len(latencies) / max(now - self._before, 1e-9)
        self._before = now
        done = LiveWindow(
            self.windows,
            intake.frames_in,
            len(self.latencies),
            intake.dropped,
            round(median(latencies), 3),
            round(max(self.latencies), 3),
            round(rate, 2),
        )
        self._output.settle(lambda _: self._told.append(done))

    def tell(self, progress: Progress) -> None:
        """Call from the caller's thread."""
        while self._told:
            progress(self._told.popleft())
