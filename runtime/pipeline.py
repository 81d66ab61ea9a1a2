"""The whole way from prepared clips to frames, as one function that reads from top to bottom.

`stream` yields finished frames, window after window; it writes nothing and prints nothing.
"""

import time
from collections.abc import Callable, Iterator

import cv2
import numpy as np

from trt_wan.errors import Stopped
from trt_wan.runtime.conditioning import Pixels, encode_condition, encode_reference, letterbox, to_signal
from trt_wan.runtime.denoise import BetweenSteps, Branch, denoise
from trt_wan.runtime.events import Progress, StageStarted, StepDone, WindowDone, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Job
from trt_wan.runtime.networks.image_encoder import encode_image
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.text_encoder import encode_text
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    encode_blank_face,
    encode_context,
    encode_face,
    encode_time,
    rope_tables,
)
from trt_wan.runtime.networks.vae import decode, encode
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.opening.model import open_job
from trt_wan.runtime.schedulers import schedule as make_schedule
from trt_wan.runtime.video.clips import FACE_SIZE, Clips, open_clips
from trt_wan.runtime.windows import Windows

ShouldStop = Callable[[], bool]


def stream(
    job: Job,
    *,
    clips: Clips | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
) -> Iterator[Pixels]:
    """Yields the video's frames, uint8 [H, W, 3], as many as the driving clip has.

    `clips` are the job's, if they are open already. `should_stop` is asked between steps and ends the stream
    with `Stopped`. Raises TrtWanError; every check that needs no computing is made before the first stage.
    """
    for frames in stream_pieces(job, clips=clips, progress=progress, should_stop=should_stop):
        yield from to_pixels(frames)


def to_pixels(frames: Array) -> Pixels:
    """float32 [3, n, H, W] in [-1, 1] to uint8 [n, H, W, 3]."""
    _, count, height, width = frames.shape
    pixels = np.empty((count, height, width, 3), np.uint8)
    # A frame at a time stays in the cache, and OpenCV puts planes together five times as fast as numpy.
    levels, planes = np.empty((3, height, width), np.float32), np.empty((3, height, width), np.uint8)
    for k, picture in enumerate(pixels):
        np.add(frames[:, k], 1, out=levels)
        np.multiply(levels, 127.5, out=levels)
        np.copyto(planes, np.rint(levels, out=levels), casting="unsafe")
        cv2.merge(list(planes), picture)
    return pixels


def stream_pieces(
    job: Job,
    *,
    clips: Clips | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
) -> Iterator[Array]:
    """`stream`, in pieces as they are decoded and before rounding: float32 [3, n, H, W] in [-1, 1].

    The GPU waits while a piece is looked at: whoever takes longer does so in a thread of his own (beside.py).
    """
    # 1. Plan: everything that can be refused is refused here.
    clips = clips or open_clips(job.inputs, job.window)
    windows = Windows(clips.frames, job.window, job.overlap)
    schedule = make_schedule(job.grid, job.steps, job.shift)
    guided = job.guidance > 1
    progress(StageStarted("weights"))
    model, tokenizer = open_job(job, clips, guided, progress)
    config, plan = model.config, model.plan
    assert config.motion.size == FACE_SIZE, (
        f"face crops are {FACE_SIZE}, {config.name} takes {config.motion.size}"
    )

    # 2. What all windows share: text, image, time, rotary tables, the reference slot.
    progress(StageStarted("text"))
    prompts = [job.prompt, job.negative_prompt] if guided else [job.prompt]
    texts = [encode_text(model, tokenizer, prompt) for prompt in prompts]
    model.release("text_encoder_layer")
    progress(StageStarted("image"))
    canvas = letterbox(clips.reference, plan.width, plan.height)
    image = encode_image(model, to_signal(canvas[None])[:, 0])
    model.release("image_encoder_embed", "image_encoder_layer")
    reference = encode_reference(model, canvas)
    contexts = [encode_context(model, text, image) for text in texts]
    times = [encode_time(model, t) for t in schedule.timesteps]
    model.release("text_embed", "image_embed", "context_kv", "time_embed")
    cos, sin = rope_tables(config, plan)
    rope = model.place(cos), model.place(sin)
    blank_face = encode_blank_face(model) if guided and clips.face is not None else None
    generator = CpuGenerator(job.seed)
    carried: Array | None = None
    clock = _StepClock(model, job, windows.total, progress, should_stop)

    for j in range(windows.total):
        indices = windows.indices(j)
        here = {"window": j + 1, "windows": windows.total}

        # 3. Condition: what this window is told by pose, face, background, mask and the frames carried over.
        progress(StageStarted("condition", **here))
        background = person = None
        if clips.background is not None and clips.mask is not None:
            background = to_signal(clips.background.window(indices))
            person = clips.mask.window(indices)[..., 0].astype(np.float32) / 255
        condition = encode_condition(model, reference, carried, background, person)
        pose = np.zeros((config.vae.latent_channels, plan.latent_frames, *condition.shape[2:]), np.float32)
        if clips.pose is not None:
            pose = encode(model, to_signal(clips.pose.window(indices)))
        face = None
        if clips.face is not None:
            face = encode_face(model, to_signal(clips.face.window(indices)).transpose(1, 0, 2, 3))
        pose_strength = job.pose_strength if clips.pose is not None else 0.0
        condition, pose = model.place(condition), model.place(pose)
        branches = [
            Branch(context, WindowCondition(condition, pose, pose_strength, window_face, job.face_strength))
            for context, window_face in zip(contexts, (face, blank_face), strict=False)
        ]

        # 4. Denoise.
        progress(StageStarted("denoise", **here))
        noise = generator.randn((config.vae.latent_channels, plan.slots, *condition.shape[2:]))
        latent = denoise(
            model,
            noise,
            branches[0],
            branches[1] if guided else None,
            job.guidance,
            job.sampler,
            schedule,
            times,
            rope,
            clock.window(j),
        )

        # 5. Decode without the reference slot; the last frames are carried into the next window as they are.
        progress(StageStarted("decode", **here))
        kept, done = windows.keep(j), 0
        carried = None
        for frames in decode(model, np.asarray(latent)[:, 1:]):
            carried = _last(job.overlap, carried, frames)
            if (piece := frames[:, max(kept.start - done, 0) : max(kept.stop - done, 0)]).shape[1]:
                yield piece
            done += frames.shape[1]
        if j == 0:
            model.executor.settle()
        progress(WindowDone(j + 1, windows.total, kept.stop - kept.start))


def _last(count: int, before: Array | None, frames: Array) -> Array:
    """The last `count` frames, or as many as there are, in memory of their own."""
    end = frames[:, -count:]
    return np.array(end) if before is None else np.concatenate([before, end], axis=1)[:, -count:]


class _StepClock:
    """Reports every step with its time and what is left, and ends the run between two steps."""

    def __init__(
        self, model: Model, job: Job, windows: int, progress: Progress, should_stop: ShouldStop
    ) -> None:
        self.wait, self.steps, self.windows = model.executor.wait, job.steps, windows
        self.progress, self.should_stop = progress, should_stop
        self.durations: list[float] = []

    def window(self, j: int) -> BetweenSteps:
        self.wait()
        last = time.perf_counter()

        def between_steps(done: int) -> None:
            nonlocal last
            host_seconds = time.perf_counter() - last
            self.wait()
            now = time.perf_counter()
            self.durations.append(now - last)
            last = now
            left = (self.windows - j) * self.steps - done
            eta = left * float(np.median(self.durations))
            self.progress(
                StepDone(j + 1, self.windows, done, self.steps, self.durations[-1], host_seconds, eta)
            )
            if self.should_stop():
                raise Stopped(
                    f"Stopped in window {j + 1} of {self.windows}, after step {done} of {self.steps}."
                )

        return between_steps
