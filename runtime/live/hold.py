"""The frame rate that a model holds, measured, and the fewer steps or smaller size with which it holds more.

Measured on a black clip of two windows, of which the second counts: the first also opens and warms up. The
networks of a preparation beside it are not in the figure; the pace of a live job goes by its own windows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import sqrt

import numpy as np

from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.events import Event, Note, Progress, StageStarted, StepDone, WindowDone, silent
from trt_wan.runtime.job import Job
from trt_wan.runtime.live.live import CLIPS
from trt_wan.runtime.pipeline import ShouldStop, to_pixels
from trt_wan.runtime.render import Streaming
from trt_wan.runtime.video.clips import FACE_SIZE, Clips
from trt_wan.runtime.video.stills import Stills

Size = tuple[int, int]  # width, height
LEAST_STEPS = 2
LEAST_SIDE = 128  # pixels
SIDE_STEP = 16


@dataclass(frozen=True)
class Held:
    """The measured seconds of a window and of its steps."""

    window: float
    steps: float  # in all
    passes: int  # through the blocks, in these steps

    def with_steps(self, job: Job) -> "Held":
        """The same for a job that differs in its steps alone."""
        passes = sum(job.computed)
        steps = self.steps / self.passes * passes
        return Held(self.window - self.steps + steps, steps, passes)

    def rate(self, job: Job) -> float:
        """New frames per second."""
        return (job.window - job.overlap) / self.window


def hold(
    job: Job,
    size: Size,
    rate: float | None,
    measured: Callable[[Job, Size], Held],
    progress: Progress = silent,
) -> tuple[Job, Size, Held]:
    """The job and the size with which the model holds `rate` frames per second, or those that come closest:
    fewer steps first, then a smaller size. None: as they are. The rate is told to `progress`.
    """
    held = measured(job, size)
    progress(_holds(job, size, held))
    while rate is not None and held.rate(job) < rate:
        if (fewer := with_fewer_steps(job, held, rate)) is not None:
            text = f"To hold {rate:g} frames per second, {job.steps} steps are lowered to {fewer.steps}."
            job, held = fewer, held.with_steps(fewer)
        elif (small := smaller(size, held.rate(job) / rate)) is not None:
            text = f"To hold {rate:g} frames per second, {told(size)} is lowered to {told(small)}."
            size = small
            held = measured(job, size)
        else:
            text = f"{rate:g} frames per second cannot be held: {held.rate(job):.1f} are the most here."
            progress(Note(text, "not_held", {"rate": round(held.rate(job), 2)}))
            break
        progress(Note(text, "lowered", {"steps": job.steps, "size": told(size)}))
        progress(_holds(job, size, held))
    return job, size, held


def told(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _holds(job: Job, size: Size, held: Held) -> Note:
    rate, steps = held.rate(job), job.schedule.steps
    text = f"{told(size)} with {steps} step{'s' * (steps > 1)} holds {rate:.1f} frames per second"
    data = {"rate": round(rate, 2), "seconds": round(held.window, 3), "size": told(size), "steps": steps}
    return Note(f"{text} ({held.window:.2f} s a window of {job.window}).", "holds", data)


def measure(
    job: Job,
    model: Streaming,
    reference: Pixels,
    size: Size,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
) -> Held:
    """Raises as the job itself would."""
    ends: list[float] = []
    steps = [0.0, 0.0]  # seconds, by window

    def watch(event: Event) -> None:
        if isinstance(event, StepDone):
            steps[event.window - 1] += event.seconds
        elif isinstance(event, WindowDone):
            ends.append(time.perf_counter())
        elif not (isinstance(event, StageStarted) and event.window):
            progress(event)

    blank = blank_clips(job, reference, size)
    for piece in model.pieces(
        job, clips=blank, progress=watch, should_stop=should_stop, begin_from=None, keep=None
    ):
        to_pixels(piece)
    return Held(ends[1] - ends[0], steps[1], max(sum(job.computed), 1))


def blank_clips(job: Job, reference: Pixels, size: Size) -> Clips:
    """Two full windows of the clips that the job has, black."""
    frames, rate = 2 * job.window - job.overlap, Fraction(30)

    def black(name: str) -> Stills | None:
        if (path := getattr(job.inputs, name)) is None:
            return None
        width, height = (FACE_SIZE, FACE_SIZE) if name == "face" else size
        picture = np.zeros((height, width, 3), np.uint8)
        return Stills(path, frames, rate, lambda k: picture, [])

    pose, face, background, mask = map(black, CLIPS)
    sizes = (*size, frames, rate)
    return Clips(reference, pose, face, background, mask, *sizes, coming=lambda wanted: min(wanted, frames))


def with_fewer_steps(job: Job, held: Held, rate: float) -> Job | None:
    """The job with the most steps that hold `rate`, or with LEAST_STEPS. None: it can have no fewer."""
    lower = None
    if job.sigmas or job.step_cache is not None:  # whose ratios are those of its steps
        return None
    for steps in range(job.steps - 1, LEAST_STEPS - 1, -1):
        lower = replace(job, steps=steps)
        if held.with_steps(lower).rate(lower) >= rate:
            break
    return lower


def smaller(size: Size, part: float) -> Size | None:
    """About `part` of the pixels, in the same shape, but smaller in any case. None: there is none."""
    for side in (sqrt(min(part, 0.97)), sqrt(min(part, 0.97)) * 0.9):
        made = tuple(int(length * side) // SIDE_STEP * SIDE_STEP for length in size)
        if min(made) < LEAST_SIDE:
            return None
        if made != size:
            return made[0], made[1]
    return None
