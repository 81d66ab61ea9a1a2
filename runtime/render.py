"""A job to a video file: frames encoded as they come, with the driving clip's rate and sound.

Frames are rounded, pasted back and encoded in another thread, in order, while the next ones are
decoded: after the last decoding only the last frames are left to write.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trt_wan.errors import TrtWanError
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.events import Progress, StageStarted, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Job
from trt_wan.runtime.paste_back import pasted_back
from trt_wan.runtime.pipeline import ShouldStop, to_pixels
from trt_wan.runtime.video.clips import Clips, open_clips
from trt_wan.runtime.video.sound import without_sound
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

    When the job fails or is stopped, the finished windows are kept beside `output` in a file that plays, and
    the error says where: a TrtWanError in its hint, any other in a note.
    """
    if clips is None:
        with open_clips(job.inputs, job.window) as clips:
            return render(
                job,
                model,
                output,
                clips=clips,
                sound=sound,
                overwrite=overwrite,
                paste_back=paste_back,
                progress=progress,
                should_stop=should_stop,
            )
    writer = VideoWriter(
        output, clips.width, clips.height, clips.rate, sound or _own_sound(clips), overwrite=overwrite
    )
    try:
        if sound is not None and not writer.has_sound:
            raise without_sound(sound)

        def write(pieces: Iterator[Array]) -> None:
            frames: Iterable[Pixels] = (frame for piece in pieces for frame in to_pixels(piece))
            if paste_back:
                background, mask = job.inputs.background, job.inputs.mask
                assert background is not None and mask is not None, "not the mode replace"
                frames = pasted_back(frames, background, mask)
            for frame in frames:
                writer.write(frame)

        with Beside(write, ROOM) as beside:

            def stop() -> bool:
                beside.check()  # a disk that is full ends the job at the next step, not with the next window
                return should_stop()

            for piece in model.pieces(job, clips=clips, progress=progress, should_stop=stop):
                beside.put(piece)
            progress(StageStarted("write"))
        writer.finish()
    except BaseException as error:
        if partial := writer.abandon(keep=True):
            where = f"The {writer.frames} finished frames are in {partial}."
            if isinstance(error, TrtWanError):
                error.add_hint(where)
            else:
                error.add_note(where)
        raise
    return Rendered(output, writer.frames, clips.width, clips.height, float(clips.rate), beside.busy_seconds)


def _own_sound(clips: Clips) -> Path | None:
    return next((clip.path for clip in (clips.pose, clips.face) if clip is not None and clip.has_sound), None)
