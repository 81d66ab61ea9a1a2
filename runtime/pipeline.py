"""From prepared clips to frames, as one function that reads from top to bottom.

`stream_pieces` yields finished frames, window after window. It writes nothing and prints nothing. It knows
the open model only as `Opened`; opening/model.py is one.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Protocol

import cv2
import numpy as np

from trt_wan.engines.lynx import FACE_SIDE
from trt_wan.errors import NotFinite, Stopped, shown
from trt_wan.runtime.colour import Matching, unused_match
from trt_wan.runtime.conditioning import (
    Pixels,
    Strengths,
    WindowClips,
    WindowRender,
    cells,
    encode_init,
    encode_window,
    prefix_latents,
    to_signal,
)
from trt_wan.runtime.context.parts import Part
from trt_wan.runtime.context.predict import PredictUnder, predict_latents
from trt_wan.runtime.context.settings import LATENT
from trt_wan.runtime.denoise import (
    BetweenSteps,
    Branch,
    NotFiniteLatent,
    Predict,
    denoise,
    noised,
    predict_window,
)
from trt_wan.runtime.events import Event, Note, Progress, StageStarted, StepDone, WindowDone, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.finite import Broken, explained, is_finite_sum
from trt_wan.runtime.guidance import Texts
from trt_wan.runtime.identity import ARCFACE_SIDE, aligned, require_inside
from trt_wan.runtime.job import MOST_NOISE, Job
from trt_wan.runtime.networks.lynx_keys import FaceInputs
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import WindowCondition
from trt_wan.runtime.networks.vae import Read, decode
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.preparation import CameraActs, Pictures, Prepared, prepare
from trt_wan.runtime.sampling.grids import Schedule
from trt_wan.runtime.sampling.samplers import SAMPLERS
from trt_wan.runtime.step_cache import Residuals, numbers, told_skips
from trt_wan.runtime.video.camera_render import Render, opened_render
from trt_wan.runtime.video.clips import (
    FACE_SIZE,
    PERSON,
    Clips,
    frames_of,
    open_clips,
    people_of,
    soft_pixels,
)
from trt_wan.runtime.video.continued import frames_before, shifted
from trt_wan.runtime.video.pictures import read_picture, read_transparent
from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.video.stills import AnyClip
from trt_wan.runtime.video.transparency import colour, transparency_note
from trt_wan.runtime.window_state import WindowState
from trt_wan.runtime.window_texts import WindowTexts
from trt_wan.runtime.windows import TRAINED_OVERLAPS, Windows

FEW_OF = 8  # a last window with fewer new frames than this part of it is told of
MASKS_AT_A_TIME = 16  # frames of the mask clip that are read together

ShouldStop = Callable[[], bool]
Keep = Callable[[WindowState], None]


class Opened(Protocol):
    """A model that stays open: any number of jobs, one after another."""

    ranks: Ranks

    def begin(self, job: Job, width: int, height: int, frames: int, progress: Progress) -> Model:
        """The model at the size of a job, with memory for its windows and steps. `frames` are the clips'."""
        ...

    def texts(self, model: Model, job: Job, progress: Progress) -> Mapping[str, Array]:
        """Features [512, dim] of every text of the job. Reports the stage "text" if one must be encoded."""
        ...


def stream_pieces(
    job: Job,
    opened: Opened,
    *,
    clips: Clips | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = lambda: False,
    begin_from: WindowState | None = None,
    keep: Keep | None = None,
) -> Iterator[Array]:
    """Yields the decoded frames in pieces, before clamping to [-1, 1] and rounding: float32 [3, n, H, W].
    Together they have as many frames as the driving clip, or with compat "kijai" as its windows have.

    With `begin_from` the windows that were finished then are skipped, and the frames that they gave are not
    yielded. `keep` gets the state after every window, when its last piece has been consumed.

    `clips` are the job's, if they are open already. `should_stop` is asked between steps, and elsewhere
    before every network; it ends the stream with `Stopped`. Raises TrtWanError. Every check that needs no
    computing is made before the first stage. The GPU idles while a piece is consumed; slow consumers should
    read from another thread (video/writer_thread.py).
    """
    if clips is None:
        with open_clips(job.inputs, job.history) as clips:
            yield from stream_pieces(
                job,
                opened,
                clips=clips,
                progress=progress,
                should_stop=should_stop,
                begin_from=begin_from,
                keep=keep,
            )
        return
    try:
        with render_of(job, clips) as render:
            yield from _stream(job, opened, clips, render, progress, should_stop, begin_from, keep)
    except Broken as broken:
        if opened.ranks.count > 1:
            raise NotFinite(
                f"A result is not a number: {broken.when}.",
                "Run the job again with --gpus 1, which finds the layer.",
            ) from None
        fault = broken
    else:
        return
    fault.__traceback__ = fault.__context__ = None  # its frames hold the arrays of the GPU
    progress(Note("A result is not a number: computing it again to find the layer.", "not_finite"))
    raise explained(opened.begin(job, clips.width, clips.height, clips.frames, silent), fault)


def _stream(
    job: Job,
    opened: Opened,
    clips: Clips,
    render: Render | None,
    progress: Progress,
    should_stop: ShouldStop,
    begin_from: WindowState | None,
    keep: Keep | None,
) -> Iterator[Array]:
    """`stream_pieces`. Raises Broken for numbers that are not finite."""
    # 1. Plan: everything that can be refused is refused here.
    before = frames_before(job.inputs, job.overlap, clips.width, clips.height, clips.rate)
    known = 0 if before is None else len(before)
    windows = job.windows(known + clips.frames)
    schedule = job.schedule
    pictures, of_pictures = pictures_of(job, clips)
    texts = WindowTexts(job, clips.frames, float(clips.rate), known)

    def told(event: Event) -> None:
        progress(event)
        if should_stop():
            raise Stopped("Stopped while the model was being opened.")

    told(StageStarted("weights"))
    model = opened.begin(job, clips.width, clips.height, windows.clip_frames, told)
    config, plan = model.config, model.plan
    assert config.motion.size == FACE_SIZE, (
        f"face crops are {FACE_SIZE}, {config.name} takes {config.motion.size}"
    )
    latent_size = plan.latent_height, plan.latent_width
    for note in (*clips.notes, *of_pictures, *_long_notes(job, windows), *(render.notes if render else ())):
        progress(note)
    if schedule.sigmas[-1]:
        progress(_noise_is_left(schedule))
    if clips.init is None and schedule.sigmas[0] <= MOST_NOISE:
        progress(_noise_alone(schedule))
    if (skipping := _skipping(job)) is not None:
        progress(skipping)
    if job.mode == "replace" and clips.face is None:
        progress(Note("There is no face clip: the model is given a grey face, which a mask needs."))
    if job.mode == "replace" and job.acting_camera is not None:
        progress(_camera_and_background())
    if unneeded := unused_match(job.colour, windows.total, job.inputs.continues):
        progress(unneeded)
    if clips.coming is None and (unused := texts.unused()):
        progress(_unused_prompts(unused))
    clock = _StepClock(model, job, windows.total, progress, should_stop)

    # 2. Prepare: text, image, time, rotary tables and the reference slot are the same for all windows.
    with model.checked(clock.stop_before_next):
        features = opened.texts(model, job, progress)
        model.release("text_encoder_layer")
        progress(StageStarted("image"))
        first = 0 if begin_from is None else begin_from.done
        pictures = replace(pictures, face=face_of(job, model))
        prepared = prepared_for(model, job, features, texts.used(min(first, windows.total - 1)), pictures)
    carried: Array | None = None if before is None else to_signal(before)
    if begin_from is None:
        slot = config.vae.latent_channels, *latent_size
        generator = noise_before(job, 0, job.seed, windows.clip_frames, slot)
    else:
        carried = begin_from.carried
        generator = CpuGenerator.from_state(begin_from.generator)
    matching = Matching(job.colour, clips.reference, None if begin_from is None else begin_from.colours)
    strengths = Strengths(job.pose_strength, job.face_strength)
    soft_before = False

    for j in count(first):
        clips = clips.until(windows.end(j) - known)
        windows = job.windows(known + clips.frames)
        if j >= windows.total:
            break
        texts, clock.windows = replace(texts, frames=clips.frames), windows.total
        here = {"window": j + 1, "windows": windows.total}

        # 3. Condition: pose, face, background, mask and the frames carried over, for this window.
        progress(StageStarted("condition", **here))
        shape = (config.vae.latent_channels, (windows.length(j) - 1) // 4 + 2, *latent_size)
        drawn = generator.randn_beside(shape)
        with model.checked(clock.stop_before_next):
            signals = _signals(job, clips, j, known, render)
            if signals.soft and not soft_before:
                progress(_soft_mask(clips, signals.soft, j))
            soft_before = soft_before or signals.soft > 0
            reference, prefix = prepared.reference, prepared.prefix
            init = signals.init and encode_init(model, reference, signals.init, signals.frames, prefix)
            window = encode_window(model, reference, signals, carried, strengths, prefix)
            context = job.context_plan(windows.length(j))
            prepared.contexts.use(texts.used(j))
            under = _under(model, job, prepared, texts, j, job.skips)
            predict = predict_latents(model, window, context, under, clock.between(j))

        # 4. Denoise.
        progress(StageStarted("denoise", **here))
        noise = _among_pictures(drawn(), generator, prepared.pictures)
        if context is not None:
            noise = model.place(context.reorder(noise, generator))  # every part takes its slots from it
        draw = partial(_drawn, generator, shape, prepared.pictures)
        solver = SAMPLERS[job.sampler].make(schedule, model.executor.combine, draw)
        try:
            latent = denoise(
                predict,
                noised(model.executor.combine, noise, init, schedule.sigmas[0]),
                solver,
                schedule.steps,
                clock.window(j),
                model.executor.is_finite,
            )
        except NotFiniteLatent as found:
            when = f"window {j + 1} of {windows.total}, step {found.step + 1} of {schedule.steps}"
            again = _Step(job, clips, features, j, known, carried, found.step, found.latent)
            raise Broken(when, again) from None

        # 5. Decode without the references' slots; known frames of pictures are dropped, and the last frames
        # are carried into the next window as matched.
        progress(StageStarted("decode", **here))
        kept, done = windows.keep(j), 0
        kept = slice(max(kept.start, known), kept.stop)
        continued, carried = carried, None
        finished = np.asarray(latent)
        latents = finished[:, reference.shape[1] :]
        del latent, solver, predict, under, window, noise, init
        with model.checked(clock.stop_before_next):
            decoded = _without_first(LATENT * prefix_latents(prefix), decode(model, latents))
            if model.ranks.rank == 0:
                decoded = matching.window(decoded, continued, signals.person)
            for frames in decoded:
                if not is_finite_sum(frames):
                    when = f"window {j + 1} of {windows.total}, decoding"
                    raise Broken(when, partial(_decode_again, latents))
                carried = _last(job.overlap, carried, frames)
                if (piece := frames[:, max(kept.start - done, 0) : max(kept.stop - done, 0)]).shape[1]:
                    yield piece
                done += frames.shape[1]
        if model.ranks.count > 1:  # rank 0 has the frames
            (carried,) = model.ranks.of_first([] if carried is None else [carried])
        if j == first:
            model.executor.settle()
        if keep is not None:
            assert carried is not None, "a window has frames"
            keep(WindowState(j + 1, carried, generator.state(), finished, matching.state))
        progress(WindowDone(j + 1, windows.total, kept.stop - kept.start))


def _under(
    model: Model,
    job: Job,
    prepared: Prepared,
    texts: WindowTexts,
    j: int,
    skips: Sequence[Sequence[bool]] = (),
) -> PredictUnder:
    residuals = Residuals(model.executor.combine, skips)

    def under(window: WindowCondition, part: Part | None) -> Predict:
        sides = branches(prepared, texts.of(j, part), window)
        caches = residuals.of(part and part.slots)
        return predict_window(model, prepared, sides, job.step_settings, job.cfg_zero_star, caches)

    return under


def branches(prepared: Prepared, texts: Texts, window: WindowCondition) -> list[Branch]:
    """The conditional side, and with guidance the unconditional one, which NAG leaves alone."""
    contexts = prepared.contexts
    identity, without = prepared.identity or (None, None)
    sides = [
        Branch(contexts.of(texts.prompt), window, identity=identity)
        if texts.nag is None
        else Branch(contexts.with_nag(texts.prompt, texts.nag), window, "cross_attention_nag", identity)
    ]
    if texts.negative is not None:
        face = None if window.face is None else prepared.blank_face
        sides.append(Branch(contexts.of(texts.negative), replace(window, face=face), identity=without))
    return sides


def prepared_for(
    model: Model, job: Job, features: Mapping[str, Array], texts: Sequence[str], pictures: Pictures
) -> Prepared:
    """`texts` are those of the first window."""
    timesteps, camera = list(job.schedule.timesteps), None
    if job.acting_camera is not None:
        camera = CameraActs([step.camera for step in job.step_settings], job.acting_camera.strength)
    return prepare(model, features, texts, pictures, job.clip_vision, job.nag, timesteps, job.guided, camera)


def render_of(job: Job, clips: Clips) -> AbstractContextManager[Render | None]:
    """The camera's render for the video of these clips. Raises InputError for a file that cannot be read."""
    size = clips.width, clips.height
    return opened_render(job.acting_camera, clips.reference, size, clips.frames, job.history)


def pictures_of(job: Job, clips: Clips) -> tuple[Pictures, list[Note]]:
    """The pictures, and notes about them. Raises InputError for one that cannot be read."""
    second, behind, references = job.clip_vision.second, job.inputs.behind, job.references
    seen = None if second is None else read_transparent(second).over(colour(behind))
    notes = [] if seen is None else _clip_notes(job, clips.reference, seen)
    if references is None:
        return Pictures(clips.reference, seen), notes
    read = {path: read_transparent(path) for path in references.pictures}
    notes += [
        transparency_note(path, picture.opacity, behind, "--reference-background")
        for path, picture in read.items()
        if picture.opacity is not None
    ]
    if note := references_note(job):
        notes.append(note)
    more = tuple(picture.over(colour(behind)) for picture in read.values())
    return Pictures(clips.reference, seen, more, references.use), notes


def _clip_notes(job: Job, reference: Pixels, second: Pixels) -> list[Note]:
    """Notes for a second CLIP picture that changes nothing."""
    weights = job.clip_vision.weights
    if weights[1] == 0:
        text = "At --clip-strength-2 0 the second CLIP picture does nothing."
    elif np.array_equal(reference, second) and sum(weights) == 1:
        text = "The second CLIP picture is the reference, so it changes nothing: the strengths add up to 1."
    else:
        return []
    return [Note(text, "clip_unused")]


def references_note(job: Job) -> Note | None:
    """A note for pictures that make the model's window longer."""
    if not (extra := LATENT * job.picture_slots):
        return None
    text = f"The model computes windows of {job.model_window} frames, {job.video_window} of them of the video"
    return Note(f"{text}; those of the pictures are left out.", "references", {"frames": extra})


def _drawn(generator: CpuGenerator, shape: Sequence[int], pictures: int) -> Array:
    return _among_pictures(generator.randn(shape), generator, pictures)


def _among_pictures(noise: Array, generator: CpuGenerator, pictures: int) -> Array:
    """`noise` of a job with one reference, and behind its slot 0 the next numbers, for other `pictures`. So
    the first window has the same noise for the video, however many there are.
    """
    if not pictures:
        return noise
    more = generator.randn((noise.shape[0], pictures, *noise.shape[2:]))
    return np.concatenate((noise[:, :1], more, noise[:, 1:]), axis=1)


def _without_first(count: int, pieces: Iterator[Array]) -> Iterator[Array]:
    """A clip in pieces [3, n, H, W] without its first `count` frames."""
    for frames in pieces:
        if (rest := frames[:, count:]).shape[1]:
            yield rest
        count = max(count - frames.shape[1], 0)


def face_of(job: Job, model: Model) -> FaceInputs | None:
    """The face for the adapters that are open; None without one. As in the official code, the picture's
    latent is drawn from the seed after the job's. Raises InputError, UsageError, WeightsError.
    """
    identity, lynx = job.acting_identity, model.lynx
    if identity is None or lynx is None:
        return None
    picture = read_picture(identity.picture)
    require_inside(identity, picture)
    embedding = signal = None
    if lynx.adapters.ip:
        from trt_wan.runtime.identity_embedder import face_embedding

        assert identity.embedder is not None
        embedding = face_embedding(identity.embedder, aligned(picture, identity.points, ARCFACE_SIDE))
    if lynx.adapters.ref:
        signal = to_signal(aligned(picture, identity.points, FACE_SIDE)[None])
    shape = model.config.vae.latent_channels, 1, FACE_SIDE // 8, FACE_SIDE // 8
    noise = CpuGenerator((job.seed + 1) % 2**64).randn(shape)
    return FaceInputs(embedding, signal, noise, identity.ip_scale, identity.ref_scale)


def _unused_prompts(unused: Sequence[str]) -> Note:
    text = f"{len(unused)} of the prompts are in no window."
    return Note(f"{text} The first: {shown(unused[0])}", "unused_prompts", {"prompts": list(unused)})


def noise_before(job: Job, j: int, seed: int, frames: int, slot: Sequence[int]) -> CpuGenerator:
    """A generator with the noise for window j of a clip of `frames`. If the sampler draws no noise in its
    steps, a whole job with that seed has the same here. The wrapper draws noise for the whole video first and
    leaves it aside (kijai_semantics.md 2.4). `slot` is the shape of a latent's slot, a multiple of 16
    numbers, so slot by slot is the same as all at once.
    """
    windows = job.windows(frames)
    lengths = [windows.length(k) for k in range(j)]
    lengths += [windows.clip_frames] if job.compat is not None and windows.total > 1 else []
    generator = CpuGenerator(seed)
    for _ in range(sum((length - 1) // LATENT + 2 + job.picture_slots for length in lengths)):
        generator.randn(slot)
    return generator


def _decode_again(latents: Array, model: Model) -> None:
    for _ in decode(model, latents):
        pass


@dataclass(frozen=True)
class _Step:
    """Computes one step again, with everything that it depends on."""

    job: Job
    clips: Clips
    features: Mapping[str, Array]
    window: int
    known: int
    carried: Array | None
    step: int
    latent: Array

    def __call__(self, model: Model) -> None:
        if self.job.context is None:
            return self._compute(model, self.clips)
        with open_clips(self.job.inputs, self.job.history) as clips:  # the first frames are gone
            self._compute(model, replace(clips, endings=self.clips.endings))

    def _compute(self, model: Model, clips: Clips) -> None:
        with render_of(self.job, clips) as render:
            self._compute_with(model, clips, render)

    def _compute_with(self, model: Model, clips: Clips, render: Render | None) -> None:
        job, j = self.job, self.window
        windows = job.windows(self.known + clips.frames)
        texts = WindowTexts(job, clips.frames, float(clips.rate), self.known)
        pictures = replace(pictures_of(job, clips)[0], face=face_of(job, model))
        prepared = prepared_for(model, job, self.features, texts.used(j), pictures)
        signals = _signals(job, clips, j, self.known, render)
        strengths = Strengths(job.pose_strength, job.face_strength)
        known = prepared.reference, signals, self.carried, strengths, prepared.prefix
        window = encode_window(model, *known)
        context = job.context_plan(windows.length(j))
        latent = self.latent if context is None else model.place(self.latent)
        under = _under(model, job, prepared, texts, j)
        predict_latents(model, window, context, under)(self.step, latent)


def _signals(job: Job, clips: Clips, j: int, known: int, render: Render | None) -> WindowClips:
    """Window j of every clip. `known` frames come before the clip."""
    windows = job.windows(known + clips.frames)
    indices, masked = (
        shifted(numbers, known, clips.lead) for numbers in (windows.indices(j), windows.mask_indices(j))
    )
    made = window_clips(clips, indices, job.mode == "replace", masked)
    seen = None if render is None else _window_render(render, shifted(windows.indices(j), known, 0))
    return replace(made, ending=clips.endings.get(j), render=seen)


def _window_render(render: Render, numbers: Sequence[int]) -> WindowRender:
    """`numbers` are those of the window's frames in the render."""

    def frames(wanted: Sequence[int]) -> Array:
        return to_signal(render.frames([numbers[k] for k in wanted]))

    return WindowRender(frames, render.still, render.key(numbers))


def window_clips(
    clips: Clips, indices: list[int], grey_face: bool, mask_indices: list[int] | None = None
) -> WindowClips:
    """The frames `indices` of every clip, `mask_indices` of the mask where they differ. `grey_face` stands in
    for a face clip that is not given.
    """
    pose = face = background = person = None
    soft = 0
    if clips.pose is not None:
        pose = _reader(clips.pose, indices)
    if clips.face is not None:
        crops = _reader(clips.face, indices)
        face = lambda start, stop: crops(start, stop).transpose(1, 0, 2, 3)  # noqa: E731
    elif grey_face:
        face = lambda start, stop: np.zeros((stop - start, 3, FACE_SIZE, FACE_SIZE), np.float32)  # noqa: E731
    if clips.background is not None and clips.mask is not None:
        background = _reader(clips.background, indices)
        person, soft = _person(clips.mask, indices if mask_indices is None else mask_indices)
    init = None if clips.init is None else _reader(clips.init, indices)
    named = {"pose": clips.pose, "face": clips.face, "background": clips.background}
    keys = {name: _key(name, clip, indices) for name, clip in named.items()}
    return WindowClips(len(indices), pose, face, background, person, soft, init, keys=keys)


def _key(name: str, clip: AnyClip | None, indices: Sequence[int]) -> Hashable:
    """The file and the frames; None for a clip that is no single file."""
    if not isinstance(clip, Clip):
        return None
    file = clip.path.stat()
    frames = clip.used, clip.frames == 1 or tuple(indices)  # the first frame of a cut may be deinterlaced
    return name, file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, len(indices), frames


def _reader(clip: AnyClip, indices: Sequence[int]) -> Read:
    return lambda start, stop: to_signal(frames_of(clip, indices[start:stop]))


def _person(clip: AnyClip, indices: Sequence[int]) -> tuple[Array, int]:
    """The person's cells [frames, h, w], and the number of soft pixels."""
    made, soft = [], 0
    for start in range(0, len(indices), MASKS_AT_A_TIME):
        masks = frames_of(clip, indices[start : start + MASKS_AT_A_TIME])
        made.append(cells(people_of(masks)).copy())
        soft += soft_pixels(masks)
    return np.concatenate(made), soft


def _long_notes(job: Job, windows: Windows) -> list[Note]:
    notes = []
    if windows.total > 1 and job.overlap not in TRAINED_OVERLAPS:
        text = f"{job.overlap} frames are carried from window to window; the model was trained with 1 and 5."
        notes.append(Note(text, "untrained_overlap", {"overlap": job.overlap}))
    if note := short_last_window(windows):
        notes.append(note)
    plan = job.context_plan(windows.length(0))
    if plan is not None:
        counts = sorted({len(plan.parts(step)) for step in range(job.schedule.steps)})
        parts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        text = f"A step takes {parts} context windows of {job.video_window} frames"
        notes.append(Note(f"{text} over {windows.length(0)}.", "context", {"windows": counts}))
    return notes


def short_last_window(windows: Windows) -> Note | None:
    """A note for a last window that is computed whole for a few frames."""
    kept = windows.keep(windows.total - 1)
    new = kept.stop - kept.start
    if windows.total == 1 or new * FEW_OF > windows.length(windows.total - 1):
        return None
    frames = f"{new} frame{'s' * (new > 1)}"
    text = f"The last of {windows.total} windows adds {frames} and takes as long as any other"
    return Note(
        f"{text}; a clip shorter by as many needs a window less.", "short_last_window", {"frames": new}
    )


def _camera_and_background() -> Note:
    text = "The background clip moves as its own camera did, so --camera can only fit to it, not change it"
    return Note(f"{text}; users of Uni3C leave out background and mask.", "camera_and_background")


def _noise_is_left(schedule: Schedule) -> Note:
    return Note(
        f"The steps end at level {schedule.sigmas[-1]:.3g}: that much noise stays in the picture.",
        "noise_left",
        {"sigma": schedule.sigmas[-1]},
    )


def _noise_alone(schedule: Schedule) -> Note:
    return Note(
        f"The steps start at level {schedule.sigmas[0]:.3g} without a video (--init): the model takes noise "
        "alone for a picture with that much of it.",
        "noise_alone",
        {"sigma": schedule.sigmas[0]},
    )


def _skipping(job: Job) -> Note | None:
    if not (skips := job.skips):
        return None
    text = f"The step cache skips {told_skips(skips)}."
    data = {"skipped": [numbers(side) for side in skips]}
    return Note(text, "step_cache", {**data, "steps": job.schedule.steps})


def _soft_mask(clips: Clips, soft: int, window: int) -> Note:
    assert clips.mask is not None, "soft pixels are those of a mask"
    name = clips.mask.path.name
    return Note(
        f"{name} is not black and white: {soft} pixels of window {window + 1} lie between. "
        f"Levels of {PERSON} and more count as the person, all others as the background.",
        "soft_mask",
        {"file": str(clips.mask.path), "pixels": soft, "window": window + 1, "threshold": PERSON},
    )


def to_pixels(frames: Array) -> Pixels:
    """float32 [3, n, H, W], clamped to [-1, 1], to uint8 [n, H, W, 3]."""
    _, count, height, width = frames.shape
    pixels = np.empty((count, height, width, 3), np.uint8)
    # A frame at a time stays in the cache, and OpenCV puts planes together five times as fast as numpy.
    levels, planes = np.empty((3, height, width), np.float32), np.empty((3, height, width), np.uint8)
    for k, picture in enumerate(pixels):
        np.add(frames[:, k], 1, out=levels)
        np.multiply(levels, 127.5, out=levels)
        np.clip(levels, 0, 255, out=levels)
        np.copyto(planes, np.rint(levels, out=levels), casting="unsafe")
        cv2.merge(list(planes), picture)
    return pixels


def _last(count: int, before: Array | None, frames: Array) -> Array:
    """The last `count` frames, or all if there are fewer, clamped to [-1, 1]."""
    end = np.clip(frames[:, -count:], -1, 1)
    return end if before is None else np.concatenate([before, end], axis=1)[:, -count:]


class _StepClock:
    """Reports every step with its time and the remaining time, and ends the run when asked to."""

    def __init__(
        self, model: Model, job: Job, windows: int, progress: Progress, should_stop: ShouldStop
    ) -> None:
        self.wait, self.steps, self.windows = model.executor.wait, job.schedule.steps, windows
        self.progress, self.should_stop = progress, should_stop
        self.computed = job.computed
        self.durations: list[float] = []  # one pass of the blocks

    def stop_before_next(self) -> None:
        """Call before a network outside the steps."""
        if self.should_stop():
            raise Stopped("Stopped between two networks, outside the denoising steps.")

    def between(self, j: int) -> Callable[[], None]:
        """Call before each context window of a step: it waits for the one before."""

        def between() -> None:
            self.wait()
            if self.should_stop():
                raise Stopped(f"Stopped in window {j + 1} of {self.windows}, between two context windows.")

        return between

    def window(self, j: int) -> BetweenSteps:
        self.wait()
        last = time.perf_counter()

        def between_steps(done: int) -> None:
            nonlocal last
            host_seconds = time.perf_counter() - last
            self.wait()
            now = time.perf_counter()
            seconds, last = now - last, now
            if passes := self.computed[done - 1]:
                self.durations.append(seconds / passes)
            left = sum(self.computed[done:]) + (self.windows - j - 1) * sum(self.computed)
            eta = left * float(np.median(self.durations))
            self.progress(StepDone(j + 1, self.windows, done, self.steps, seconds, host_seconds, eta))
            if self.should_stop():
                raise Stopped(
                    f"Stopped in window {j + 1} of {self.windows}, after step {done} of {self.steps}."
                )

        return between_steps
