"""A job to a video file: frames encoded as they come, with the driving clip's rate and sound.

Frames are rounded and pasted back in another thread, in order, while the next ones are decoded. Each window
is encoded in a thread of its own (video/part.py): after the last decoding only the last frames are left to
write. A window counts as finished when its frames are on the disk, and with a record the state after it, from
which a later process goes on.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from trt_wan.errors import tell_with
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.events import Event, Note, Progress, StageStarted, WindowDone, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Job
from trt_wan.runtime.kept import windows as kept_windows
from trt_wan.runtime.kept.record import Record, write_sidecar
from trt_wan.runtime.paste_back import pasted_back
from trt_wan.runtime.pipeline import Keep, ShouldStop, to_pixels
from trt_wan.runtime.video.clips import Clips, open_clips
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.frame_folder import FrameFolder
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.sound import without_sound
from trt_wan.runtime.video.target import check_target, claimed, explained, require_audible
from trt_wan.runtime.video.working_file import Settled
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.video.writer_thread import Beside
from trt_wan.runtime.window_state import WindowState

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
    writing_seconds: float  # the writing thread takes them beside the rest, with its waits for encoders


class Streaming(Protocol):
    """An open model as `render` uses it (opening/model.py)."""

    def pieces(
        self,
        job: Job,
        *,
        clips: Clips | None,
        progress: Progress,
        should_stop: ShouldStop,
        begin_from: WindowState | None,
        keep: Keep | None,
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
    record: Record | None = None,
    sidecar: bool = True,
    resume: bool = False,
    quality: Quality | None = None,
    frames: Path | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
) -> Rendered:
    """Writes `output`. `clips` are the job's, if they are open already. `sound` is the file whose sound is
    copied; without it, the pose or face clip's own is. With `paste_back` (mode replace) the pixels around the
    mask are those of the background clip. `frames` is a folder for every frame as a PNG (frame_folder.py).
    `record` is written into the video's metadata, and with `sidecar` beside it.

    When the job fails or is stopped, the finished frames are kept beside `output` in a file that plays, and
    the error says where: a TrtWanError in its hint, any other in a note. A file that was kept before stays.
    With a record the state after the last finished window is kept too, and `resume` goes on from there, with
    the same bits (kept/windows.py). Raises OutputError if another process is writing `output`.
    """
    check_target(output, overwrite)
    with ExitStack() as held:
        held.enter_context(claimed(output, progress))
        clips = clips or held.enter_context(open_clips(job.inputs, job.history))
        kept = kept_windows.find(output, record, progress) if resume and record is not None else None
        if resume and record is not None:
            kept_windows.forget_begun(output, record, job.windows(clips.frames).keep(0).stop, progress)
        settled = kept.settled if kept is not None else None
        audible = sound or own_sound(clips)
        writer = VideoWriter(
            output,
            clips.width,
            clips.height,
            clips.rate,
            audible,
            overwrite=overwrite,
            quality=quality or Quality(),
            sound_start=clips.start,
            settled=settled,
            comment=record.text(with_paths=False) if record is not None else "",
        )
        begin_from = kept.state if kept is not None else None
        folder = None
        try:
            if sound is not None and not writer.has_sound:
                require_audible(output)
                raise without_sound(sound, clips.start)
            if own_sound(clips) and KINDS[output.suffix.lower()].is_gif:
                progress(Note("A GIF has no sound: that of the clip is left out.", "no_sound"))
            if frames is not None:
                unfinished = writer.partial.stem.rpartition(".")[2]  # "partial-2" beside out.partial-2.mp4
                folder = FrameFolder(frames, overwrite, writer.frames, unfinished)
            windows = _Windows(writer, progress, record)
            seconds = _write(job, model, clips, windows, folder, begin_from, paste_back, should_stop)
            kept_windows.remove(writer.partial)
        except BaseException as error:
            if partial := writer.abandon(keep=True, at_once=isinstance(error, KeyboardInterrupt)):
                where = f"The {writer.kept} finished frames are in {partial}."
                if folder is not None:
                    where += f" Their PNG files are in {folder.partial}."
                tell_with(error, where)
            raise
        if record is not None and sidecar:
            with explained(output):
                write_sidecar(output, record, progress)
    return Rendered(output, writer.frames, clips.width, clips.height, float(clips.rate), seconds)


def _write(
    job: Job,
    model: Streaming,
    clips: Clips,
    windows: "_Windows",
    folder: FrameFolder | None,
    begin_from: WindowState | None,
    paste_back: bool,
    should_stop: ShouldStop,
) -> float:
    """Writes and finishes the video. Returns Rendered.writing_seconds."""
    writer, progress = windows.writer, windows.progress

    def write(items: Iterator[Array | WindowState | WindowDone]) -> None:
        frames: Iterable[Pixels] = windows.frames(items)
        if paste_back:
            background, mask = job.inputs.background, job.inputs.mask
            assert background is not None and mask is not None, "not the mode replace"
            frames = pasted_back(frames, background, mask, clips.cut, writer.frames)
        for frame in frames:
            writer.write(frame)
            if folder is not None:
                folder.write(frame)

    with Beside(write, ROOM) as beside:

        def told(event: Event) -> None:
            windows.tell()
            if isinstance(event, WindowDone):
                beside.put(event)
            else:
                progress(event)

        def stop() -> bool:
            beside.check()  # a disk that is full ends the job at the next step, not with the next window
            writer.check()
            windows.tell()
            return should_stop()

        for piece in model.pieces(
            job, clips=clips, progress=told, should_stop=stop, begin_from=begin_from, keep=beside.put
        ):
            beside.put(piece)
        progress(StageStarted("write"))
    writer.wait()
    windows.tell()
    writer.finish()
    if folder is not None:
        folder.finish()
    if windows.last is not None:
        progress(windows.last)
    return beside.busy_seconds


class _Windows:
    """Tells of a finished window when its frames are on the disk, in the caller's thread. With a record, the
    state after it is kept.
    """

    def __init__(self, writer: VideoWriter, progress: Progress, record: Record | None) -> None:
        self.writer, self.progress = writer, progress
        self._record = record
        self._settled: SimpleQueue[WindowDone] = SimpleQueue()
        self.last: WindowDone | None = None  # told when the file is finished

    def frames(self, items: Iterator[Array | WindowState | WindowDone]) -> Iterator[Pixels]:
        """Ask for a frame after the one before is written. Belongs to the writing thread."""
        state: WindowState | None = None
        for item in items:
            if isinstance(item, WindowState):
                state = item
            elif not isinstance(item, WindowDone):
                yield from to_pixels(item)
            else:
                self.writer.settle(functools.partial(self._finished, item, state))
                state = None

    def _finished(self, window: WindowDone, state: WindowState | None, settled: Settled) -> None:
        """Belongs to the thread of the window."""
        if state is not None and self._record is not None:
            kept_windows.save(self.writer.partial, self._record, settled, state)
        if window.window < window.windows:
            self._settled.put(window)
        else:
            self.last = window

    def tell(self) -> None:
        while not self._settled.empty():
            self.progress(self._settled.get())


def own_sound(clips: Clips) -> Path | None:
    return next((clip.path for clip in (clips.pose, clips.face) if clip is not None and clip.has_sound), None)
