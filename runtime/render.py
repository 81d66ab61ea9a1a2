"""A job to a video file: frames encoded as they come, with the driving clip's rate and sound."""

from dataclasses import dataclass
from pathlib import Path

from trt_wan.errors import InputError, TrtWanError
from trt_wan.preprocess.background import pasted_back
from trt_wan.runtime.clips import Clips, open_clips
from trt_wan.runtime.events import Progress, silent
from trt_wan.runtime.job import Job
from trt_wan.runtime.pipeline import ShouldStop, stream
from trt_wan.runtime.writer import VideoWriter


@dataclass(frozen=True)
class Rendered:
    path: Path
    frames: int
    width: int
    height: int
    rate: float  # frames per second


def render(
    job: Job,
    output: Path,
    *,
    sound: Path | None = None,
    overwrite: bool = False,
    paste_back: bool = False,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
) -> Rendered:
    """Writes `output`. `sound` is the file whose sound is copied; without it, the pose or face clip's own is.
    With `paste_back` (mode replace) pixels that the model had no part in are the background clip's own.

    When the job fails or is stopped, the finished windows are kept beside `output` in a file that plays, and
    the error says where: a TrtWanError in its hint, any other in a note.
    """
    clips = open_clips(job.inputs, job.window)
    writer = VideoWriter(
        output, clips.width, clips.height, clips.rate, sound or _own_sound(clips), overwrite=overwrite
    )
    try:
        if sound is not None and not writer.has_sound:
            raise InputError(f"{sound} has no sound.", "Leave out --audio, or name a file with sound.")
        frames = stream(job, clips=clips, progress=progress, should_stop=should_stop)
        if paste_back:
            assert job.inputs.background is not None and job.inputs.mask is not None, "not the mode replace"
            frames = pasted_back(frames, job.inputs.background, job.inputs.mask)
        for frame in frames:
            writer.write(frame)
        writer.finish()
    except BaseException as error:
        if partial := writer.abandon(keep=True):
            where = f"The {writer.frames} finished frames are in {partial}."
            if isinstance(error, TrtWanError):
                error.hint = f"{error.hint} {where}".strip()
            else:
                error.add_note(where)
        raise
    return Rendered(output, writer.frames, clips.width, clips.height, float(clips.rate))


def _own_sound(clips: Clips) -> Path | None:
    return next((clip.path for clip in (clips.pose, clips.face) if clip is not None and clip.has_sound), None)
