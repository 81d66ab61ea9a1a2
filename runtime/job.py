"""One job, built once and passed whole: its clips, its prompt, and how it is denoised."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trt_wan.engines.lynx import Lynx
from trt_wan.engines.shape import Plan
from trt_wan.errors import UsageError, shown
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.colour import Colour
from trt_wan.runtime.context.parts import ContextPlan
from trt_wan.runtime.context.settings import LATENT, Compat, Context
from trt_wan.runtime.fields import check_fields
from trt_wan.runtime.guidance import (
    ClipVision,
    Nag,
    StepSettings,
    Texts,
    acting,
    per_step,
    require_strength,
)
from trt_wan.runtime.identity import FACE_PROMPT, FaceIdentity
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.prompts import DEFAULT_NEGATIVE_PROMPT, DEFAULT_PROMPT, Prompts
from trt_wan.runtime.references import References, Use
from trt_wan.runtime.sampling.grids import Schedule, schedule, schedule_of
from trt_wan.runtime.sampling.samplers import SAMPLERS
from trt_wan.runtime.step_cache import LEAST_STEPS, StepCache, skipped_steps
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.transparency import colour
from trt_wan.runtime.windows import Windows, rounded_down, rounded_up

Mode = Literal["animate", "replace"]

MOST_LORA_STRENGTH = 100
MOST_NOISE = 0.999  # level from which on nothing of a video is left

BACKGROUNDS, MASKS = ("src_bg.mp4", "src_bg.png"), ("src_mask.mp4", "src_mask.png")


@dataclass(frozen=True)
class Inputs:
    """The prepared clips. All have the same number of frames and the size of the video; faces are 512x512.
    Background and mask may be one picture, which stands for all frames. The steps start from `init`, noised.
    """

    reference: Path
    pose: Path | None
    face: Path | None
    background: Path | None = None
    mask: Path | None = None
    trim_to_shortest: bool = False  # cut longer clips at their ends
    behind: str = "white"  # the colour behind a transparent reference: a name or #rrggbb
    cut: Cut | None = None  # the frames of all clips that are used
    start_frame: Path | None = None  # a picture that the video goes on from
    extend: Path | None = None  # a finished video that it goes on from
    init: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pose is None and self.face is None:
            raise UsageError(
                "There is neither a pose clip nor a face clip, so nothing drives the character.",
                "Give at least one of src_pose.mp4 and src_face.mp4.",
            )
        if self.start_frame is not None and self.extend is not None:
            raise UsageError(
                "The video can go on from a picture or from a video, not from both.",
                "Give --start-frame or --extend.",
            )
        colour(self.behind)

    @property
    def continues(self) -> bool:
        """Whether the video goes on from a picture or another video."""
        return self.start_frame is not None or self.extend is not None

    @staticmethod
    def from_folder(
        folder: Path,
        mode: Mode,
        *,
        trim_to_shortest: bool = False,
        behind: str = "white",
        init: Path | None = None,
    ) -> "Inputs":
        """The official preprocessing's file names; every clip is optional by the rules of `mode`. Background
        and mask may be .png in place of .mp4.
        """

        def clip(*names: str) -> Path | None:
            return next((folder / name for name in names if (folder / name).exists()), None)

        if not (folder / "src_ref.png").exists():
            raise UsageError(
                f"There is no src_ref.png in {folder}.",
                "Name the folder of the prepared clips with --inputs DIR: src_ref.png, src_pose.mp4, "
                "src_face.mp4, and for --mode replace src_bg.mp4 and src_mask.mp4.",
            )
        background, mask = clip(*BACKGROUNDS), clip(*MASKS)
        if mode == "replace" and (background is None or mask is None):
            missing = (
                "src_mask.mp4" if background else "src_bg.mp4" if mask else "src_bg.mp4 and src_mask.mp4"
            )
            raise UsageError(
                f"The mode replace needs the background and the mask together; {folder} lacks {missing}.",
                f"Add {'it' if background or mask else 'them'}, or use --mode animate.",
            )
        if mode == "animate":
            background = mask = None
        return Inputs(
            folder / "src_ref.png",
            clip("src_pose.mp4"),
            clip("src_face.mp4"),
            background,
            mask,
            trim_to_shortest,
            behind,
            init=init,
        )


def unused_clips(folder: Path, mode: Mode) -> list[str]:
    """The prepared clips in `folder` that `mode` leaves aside."""
    names = (*BACKGROUNDS, *MASKS) if mode == "animate" else ()
    return [name for name in names if (folder / name).exists()]


@dataclass(frozen=True)
class Lora:
    """A LoRA file and the factor of all that it adds to the weights, the same in every step: weights are
    merged before the first. A negative factor subtracts; 0 leaves the stored bits as they are.
    """

    file: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.strength) and abs(self.strength) <= MOST_LORA_STRENGTH):
            raise UsageError(
                f"A LoRA strength of {shown(self.strength)} is not possible: it is a number from "
                f"-{MOST_LORA_STRENGTH} to {MOST_LORA_STRENGTH}, mostly 1.",
                "Write --lora FILE:STRENGTH, such as --lora FILE:0.8",
            )


@dataclass(frozen=True)
class Load:
    """The parts of a job that decide, beside its size, how much memory it takes."""

    steps: int = 20
    guided: bool = False
    nag: bool = False
    contexts: int = 1  # prompts whose keys and values are held at a time
    travels: bool = False  # whether the prompts change, so that contexts are computed between windows
    camera_ffn: int = 0  # channels of Uni3C's FFN (opening/model.py sets it); 0 without a camera
    lynx: Lynx | None = None  # the adapters that act
    pictures: int = 1  # references, as far as they make the model's window longer
    use: Use = "composite"
    cached: bool = False  # whether steps are skipped, so that residuals are held


@dataclass(frozen=True)
class Job:
    """Raises UsageError for settings that are invalid for every clip."""

    inputs: Inputs
    mode: Mode = "animate"
    prompt: str = DEFAULT_PROMPT  # this and the negative prompts may hold several texts (prompts.py)
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    window: int = 77  # frames
    overlap: int = 1  # frames carried from one window to the next, 4k+1; 1 and 5 are trained
    steps: int = 20
    guidance: float | tuple[float, ...] = 1.0  # one value, or one a step; runs only in steps above 1
    sampler: str = "unipc"
    grid: str = "official"
    shift: float = 5.0
    seed: int = 0
    pose_strength: float = 1.0
    face_strength: float = 1.0
    loras: tuple[Lora, ...] = ()  # merged into the transformer; their order does not matter
    # Colour
    colour: Colour | None = None  # against drift from window to window
    # Guidance (guidance.py); percent of the steps
    cfg_zero_star: bool = False  # scales the negative prompt's side to the prompt's (addons_spec.md 6)
    nag: Nag | None = None
    clip_vision: ClipVision = ClipVision()
    references: References | None = None  # pictures beside inputs.reference
    pose_start: float = 0.0
    pose_end: float = 100.0
    face_start: float = 0.0
    face_end: float = 100.0
    camera: Camera | None = None
    identity: FaceIdentity | None = None  # a face, by Lynx
    # Sampling: a part of the steps, from a video
    sigmas: tuple[float, ...] = ()  # noise levels in place of grid, steps and shift
    start_step: int = 0  # the first step that is run; later than 0 with `inputs.init` alone
    end_step: int | None = None  # the first step that is not run any more
    denoise_strength: float = 1.0  # another way to say start_step
    step_cache: StepCache | None = None  # skips the blocks in some steps
    # Long videos
    context: Context | None = None  # windows are denoised in parts that overlap
    compat: Compat | None = None  # "kijai": the windows and noise of ComfyUI-WanVideoWrapper

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.mode == "replace") != (self.inputs.background is not None and self.inputs.mask is not None):
            raise UsageError(
                "Background and mask belong to the mode replace and come together.",
                "Give both with mode replace, neither with mode animate.",
            )
        if self.sampler not in SAMPLERS:
            raise UsageError(
                f"There is no sampler called {self.sampler!r}.", f"Use one of {', '.join(SAMPLERS)}."
            )
        require_strength("pose", self.pose_strength)
        require_strength("face", self.face_strength)
        # Each of these raises UsageError for its own settings.
        if self.context is not None and self.video_window < 5:
            raise UsageError(
                f"The wrapper counts the reference among its {self.context.frames} context frames: too few.",
                "Use --context-frames 9 or more, or leave out --compat.",
            )
        Plan(16, 16, self.video_window)
        Plan(16, 16, self.model_window)
        Windows(1, self.window, self.overlap)
        self._require_references()
        self._require_long()
        self._require_init()
        self._require_step_cache()
        CpuGenerator(self.seed)
        _ = self.texts, self.step_settings

    @property
    def encoded_texts(self) -> tuple[str, ...]:
        """Those of `texts`, and the text that the identity needs."""
        identity = self.acting_identity
        needed = identity is not None and identity.ref_scale > 0
        return tuple(dict.fromkeys((*self.texts, *((FACE_PROMPT,) if needed else ()))))

    @property
    def acting_identity(self) -> FaceIdentity | None:
        """None also for one that changes nothing."""
        return self.identity if self.identity is not None and self.identity.acts else None

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that must be encoded, once, in the order of its first use."""
        return tuple(dict.fromkeys(text for prompts in self._prompts.values() for text in prompts.texts))

    def texts_of(self, chosen: Callable[[Prompts], str]) -> Texts:
        """The texts of one window: `chosen` takes one of each of the prompts."""
        return Texts(**{name: chosen(prompts) for name, prompts in self._prompts.items()})

    @property
    def step_settings(self) -> tuple[StepSettings, ...]:
        steps = self.schedule.steps
        pose = acting("pose", self.pose_start, self.pose_end, steps)
        face = acting("face", self.face_start, self.face_end, steps)
        c = self.acting_camera
        camera = [False] * steps if c is None else acting("camera", c.start, c.end, steps)
        identity = (False,) * steps if self.identity is None else self.identity.acting(steps)
        rows = zip(per_step(self.guidance, steps), pose, face, camera, identity, strict=True)
        return tuple(StepSettings(*row) for row in rows)

    @property
    def acting_camera(self) -> Camera | None:
        """The camera, if it changes anything."""
        return self.camera if self.camera is not None and self.camera.acts else None

    @property
    def skips(self) -> tuple[tuple[bool, ...], ...]:
        """For every side of the guidance whether the step cache skips a step. Empty without a cache. Call
        when it has its ratios (step_ratios.py).
        """
        cache, steps = self.step_cache, self.step_settings
        if cache is None or not cache.threshold:
            return ()
        assert cache.ratios is not None, "the ratios of the step cache have not been read"
        whole = self.whole_schedule.steps
        sides = enumerate(cache.ratios.sides[: 1 + self.guided])
        first = self._first_step(whole)
        return tuple(skipped_steps(cache, ratios, side, steps, whole, first) for side, ratios in sides)

    @property
    def computed(self) -> tuple[int, ...]:
        """How many times the blocks run in every step."""
        skips = self.skips
        return tuple(
            step.passes - sum(side[i] for side in skips) for i, step in enumerate(self.step_settings)
        )

    @property
    def model_window(self) -> int:
        """Frames of one forward of the model, for which its engines are built. Known frames in front of the
        video count, and so do pictures in their own slots.
        """
        return self.video_window + LATENT * self.picture_slots

    @property
    def picture_slots(self) -> int:
        """Slots of other pictures, behind the reference's in every forward of the model."""
        return 0 if self.references is None else self.references.latents

    @property
    def video_window(self) -> int:
        """Frames of the video in one forward of the model."""
        if self.context is None:
            return self.window
        # The wrapper counts the reference's slot among those of a context window.
        return self.context.frames - (LATENT if self.compat else 0)

    @property
    def history(self) -> int:
        """Frames of a clip that may be read again. Long windows read those that are carried, and at the end
        of the clip those that fill up the shortest window.
        """
        return self.window if self.context is None else max(self.video_window, self.overlap)

    def windows(self, frames: int) -> Windows:
        """The windows of the loop over a clip of that many frames."""
        frames = frames if self.compat is None or frames < 1 else rounded_down(frames)
        whole_frames = self.compat is not None
        if self.context is None:
            return Windows(frames, self.window, self.overlap, whole_frames=whole_frames)
        least = self.video_window
        window = max(least, rounded_up(frames)) if self.context.whole else self.window
        return Windows(frames, window, self.overlap, least, whole_frames)

    def context_plan(self, frames: int) -> ContextPlan | None:
        """The context windows of a window of the loop of that many frames."""
        if self.context is None:
            return None
        shared = 1 + self.picture_slots
        whole, size = (shared + (count - 1) // LATENT + 1 for count in (frames, self.video_window))
        return ContextPlan(self.context, whole, size, self.compat, shared)

    def _require_references(self) -> None:
        if self.references is None:
            return
        self.references.require_others(self.inputs.reference)
        if self.compat is not None and self.references.latents:
            raise UsageError(
                f"The wrapper gives the model no other pictures as {self.references.use!r}.",
                "Leave out --compat, or use --reference-as composite.",
            )

    def _require_long(self) -> None:
        context, compat = self.context, self.compat
        if compat is not None and self.overlap != 1:
            raise UsageError(
                f"The wrapper carries 1 frame, not {self.overlap}.", "Leave out --overlap, or --compat."
            )
        if context is None:
            return
        if context.whole:
            if self.overlap != 1:
                raise UsageError(
                    "Context windows over the whole video carry no frames, so --overlap would do nothing.",
                    "Leave out --overlap, or give --window as well.",
                )
            if self.window != Job.window:
                raise UsageError(
                    f"Context windows over the whole video need no window of {self.window} frames.",
                    "Leave window out, or give the context whole=False.",
                )
            if compat is not None and context.schedule == "uniform_looped":
                raise UsageError(
                    "In the wrapper uniform_looped fails with Animate: its windows tear pose and face apart.",
                    "Leave out --compat: these windows are right there.",
                )
            return
        if compat is not None:
            raise UsageError(
                "The wrapper has no context windows inside the windows of --window.",
                "Leave out --window, --context or --compat.",
            )
        Plan(16, 16, self.window)
        if self.window < context.frames:
            raise UsageError(
                f"A window of {self.window} frames is shorter than its context windows of {context.frames}.",
                f"Use --window {context.frames} or more, or --context-frames {self.window}.",
            )

    @property
    def schedule(self) -> Schedule:
        """The noise levels of the steps that are run. Raises UsageError."""
        whole = self.whole_schedule
        end = whole.steps if self.end_step is None else self.end_step
        start = self._first_step(whole.steps)
        if not 0 <= start < end <= whole.steps:
            raise UsageError(
                f"Steps {shown(start)} to {shown(end)} are no part of {whole.steps} steps.",
                f"Use --start-step from 0, and --end-step up to {whole.steps} and above the start.",
            )
        return whole.part(start, end)

    @property
    def whole_schedule(self) -> Schedule:
        """The noise levels of all steps, also of those that are not run. Raises UsageError."""
        return schedule_of(self.sigmas) if self.sigmas else schedule(self.grid, self.steps, self.shift)

    def _first_step(self, steps: int) -> int:
        """ComfyUI-WanVideoWrapper's rule: int(steps·strength) + 1 steps are run, at most all."""
        if not 0 < self.denoise_strength <= 1:
            raise UsageError(
                f"A denoise strength of {self.denoise_strength} is not possible.",
                "Use --denoise-strength above 0, where little changes, up to 1.",
            )
        if self.denoise_strength == 1:
            return self.start_step
        if self.start_step:
            raise UsageError(
                "A denoise strength and a start step both say where the steps start.",
                "Give --denoise-strength or --start-step.",
            )
        return max(0, steps - int(steps * self.denoise_strength) - 1)

    def _require_init(self) -> None:
        first = self.schedule.sigmas[0]
        late = self.start_step > 0 or self.denoise_strength < 1
        if late and self.inputs.init is None:
            raise UsageError(
                "There is no video to start from in a later step.",
                "Add --init VIDEO, or leave out --start-step and --denoise-strength.",
            )
        if self.inputs.init is not None and first > MOST_NOISE:
            whole = sum(level > 0 for level in self.sigmas) or self.steps
            strength = 0.5 if whole > 2 else 0.25  # less than all steps by the rule of `_first_step`
            fewer = f"Use --denoise-strength {strength}, or --start-step 1 or later."
            raise UsageError(
                f"The steps start from noise alone (level {first:g}), so the init video would do nothing.",
                fewer if whole > 1 else "Use more steps, of which the first is left out: --steps 2.",
            )

    def _require_step_cache(self) -> None:
        cache, steps = self.step_cache, self.schedule.steps
        if cache is None or not cache.threshold:
            return
        off = "leave out --step-cache"
        if steps < LEAST_STEPS:
            raise UsageError(
                f"The step cache is for {LEAST_STEPS} steps and more: {steps} steps differ too much from one "
                "to the next.",
                f"Use --steps 20, or {off}: a distill LoRA saves more than it would.",
            )
        if SAMPLERS[self.sampler].stochastic:
            good = ", ".join(name for name, row in SAMPLERS.items() if not row.stochastic)
            raise UsageError(
                f"The sampler {self.sampler} adds noise in every step, and what the step cache holds would "
                "belong to other noise.",
                f"Use one of --sampler {good}, or {off}.",
            )
        if self.context is not None and self.context.schedule != "static_standard":
            raise UsageError(
                f"The context windows of {self.context.schedule} move with every step, and what the step "
                "cache holds would belong to other windows.",
                f"Use --context static_standard, or {off}.",
            )
        if cache.ratios is not None and self.guided and not cache.ratios.negative:
            raise UsageError(
                "The ratios of the step cache were made without guidance, so the negative prompt has none.",
                "Make others with `bench calibrate-cache` and the options of this job, or use --guidance 1.",
            )

    @property
    def guided(self) -> bool:
        """Whether a step is computed for the negative prompt too."""
        return any(guidance > 1 for guidance in per_step(self.guidance, self.schedule.steps))

    @property
    def load(self) -> Load:
        prompts = self._prompts.values()
        travels = any(len(each.texts) > 1 for each in prompts)
        # Context windows of one step may have any of the texts.
        together = travels and self.context is not None
        contexts = sum(len(each.texts) for each in prompts) if together else len(prompts)
        cached = any(map(any, self.skips))
        made = Load(self.schedule.steps, self.guided, self.nag is not None, contexts, travels, cached=cached)
        if self.references is None or not self.references.latents:
            return made
        return replace(made, pictures=1 + len(self.references.pictures), use=self.references.use)

    @property
    def _prompts(self) -> dict[str, Prompts]:
        """By field of `Texts`."""
        given = {"prompt": self.prompt}
        if self.guided:
            given["negative"] = self.negative_prompt
        if self.nag is not None:
            given["nag"] = self.nag.prompt
        return {name: Prompts.parse(prompt) for name, prompt in given.items()}
