"""A job to a video file: frames encoded as they come, with the driving clip's rate and sound.

Frames are rounded, pasted back and encoded in another thread, in order, while the next ones are
decoded: after the last decoding only the last frames are left to write. A window counts as finished when its
frames are on the disk.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from trt_wan.errors import TrtWanError
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.events import Event, Progress, StageStarted, WindowDone, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Job
from trt_wan.runtime.paste_back import pasted_back
from trt_wan.runtime.pipeline import ShouldStop, to_pixels
from trt_wan.runtime.video.clips import Clips, open_clips
from trt_wan.runtime.video.sound import without_sound
from trt_wan.runtime.video.target import check_target, claimed
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.video.writer_thread import Beside

# Decoded pieces that may wait to be written, of 4 frames each (`Plan.vae_chunk` 1): 64 frames of float32, in
# all 0.3 GB at 832x480 and less than a window.
ROOM = 16


@dataclass(frozen=True)
class Rendered:
    path: Path
    frames: int
    width: int
    height: int
    rate: float  # frames per second
    writing_seconds: float  # busy seconds of the writing thread, which runs beside the rest


class Streaming(Protocol):
    """An open model as `render` uses it (opening/model.py)."""

    def pieces(
        self, job: Job, *, clips: Clips | None, progress: Progress, should_stop: ShouldStop
    ) -> Iterator[Array]: ...


def render(
    job: Job,
    model: Streaming,
    output: Path,
    *,
    clips: Clips | None = None,
    sound: Path | None = None,
    overwrite: bool = False,
    paste_back: bool = False,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
) -> Rendered:
    """Writes `output`. `clips` are the job's, if they are open already. `sound` is the file whose sound is
    copied; without it, the pose or face clip's own is. With `paste_back` (mode replace) the pixels around the
    mask are those of the background clip.

    When the job fails or is stopped, the finished frames are kept beside `output` in a file that plays, and
    the error says where: a TrtWanError in its hint, any other in a note. A file that was kept before stays.
    Raises OutputError if another process is writing `output`.
    """
    check_target(output, overwrite)
    with ExitStack() as held:
        held.enter_context(claimed(output, progress))
        clips = clips or held.enter_context(open_clips(job.inputs, job.history))
        writer = VideoWriter(
            output, clips.width, clips.height, clips.rate, sound or _own_sound(clips), overwrite=overwrite
        )
        try:
            if sound is not None and not writer.has_sound:
                raise without_sound(sound)
            seconds = _write(job, model, clips, writer, paste_back, progress, should_stop)
        except BaseException as error:
            if partial := writer.abandon(keep=True):
                where = f"The {writer.kept} finished frames are in {partial}."
                if isinstance(error, TrtWanError):
                    error.add_hint(where)
                else:
                    error.add_note(where)
            raise
    return Rendered(output, writer.frames, clips.width, clips.height, float(clips.rate), seconds)


def _write(
    job: Job,
    model: Streaming,
    clips: Clips,
    writer: VideoWriter,
    paste_back: bool,
    progress: Progress,
    should_stop: ShouldStop,
) -> float:
    """Writes and finishes the video. Returns the seconds that the writing thread was busy."""
    windows = _Windows(writer, progress)

    def write(items: Iterator[Array | WindowDone]) -> None:
        frames: Iterable[Pixels] = windows.frames(items)
        if paste_back:
            background, mask = job.inputs.background, job.inputs.mask
            assert background is not None and mask is not None, "not the mode replace"
            frames = pasted_back(frames, background, mask)
        for frame in frames:
            writer.write(frame)

    with Beside(write, ROOM) as beside:

        def told(event: Event) -> None:
            windows.tell()
            if isinstance(event, WindowDone):
                beside.put(event)
            else:
                progress(event)

        def stop() -> bool:
            beside.check()  # a disk that is full ends the job at the next step, not with the next window
            windows.tell()
            return should_stop()

        for piece in model.pieces(job, clips=clips, progress=told, should_stop=stop):
            beside.put(piece)
        progress(StageStarted("write"))
    windows.tell()
    writer.finish()
    if windows.last is not None:
        progress(windows.last)
    return beside.busy_seconds


class _Windows:
    """Tells of a finished window when its frames are on the disk, in the caller's thread."""

    def __init__(self, writer: VideoWriter, progress: Progress) -> None:
        self._writer, self._progress = writer, progress
        self._settled: SimpleQueue[WindowDone] = SimpleQueue()
        self.last: WindowDone | None = None  # no `settle` for it: the file is finished next

    def frames(self, items: Iterator[Array | WindowDone]) -> Iterator[Pixels]:
        """Ask for a frame after the one before is written. Belongs to the writing thread."""
        for item in items:
            if not isinstance(item, WindowDone):
                yield from to_pixels(item)
            elif item.window < item.windows:
                self._writer.settle()
                self._settled.put(item)
            else:
                self.last = item

    def tell(self) -> None:
        while not self._settled.empty():
            self._progress(self._settled.get())


def _own_sound(clips: Clips) -> Path | None:
    return next((clip.path for clip in (clips.pose, clips.face) if clip is not None and clip.has_sound), None)
