"""`AnimatePipeline`: a model that stays open, called with diffusers' names.

    from trt_wan import AnimatePipeline

    with AnimatePipeline.from_pretrained("models/") as pipe:
        pipe.load_lora("distill.safetensors")
        video = pipe(image="character.png", driving_video="dance.mp4", num_inference_steps=4).frames[0]

Nothing is computed here: a call becomes a `Job`, which the open model streams.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self, get_args

import numpy as np

from trt_wan.api.media import Media, as_pil, picture_file, video_file
from trt_wan.api.names import RENAMED, unknown_setting
from trt_wan.cli.missing import require_graphs, tile_exporter
from trt_wan.engines.contract import Part
from trt_wan.errors import UsageError, shown
from trt_wan.runtime.closing import Closing
from trt_wan.runtime.events import Event, Progress, StepDone, silent
from trt_wan.runtime.job import Inputs, Job, Lora, Mode
from trt_wan.runtime.opening.model import Basis, OpenModel, open_basis
from trt_wan.runtime.prompts import DEFAULT_NEGATIVE_PROMPT, DEFAULT_PROMPT
from trt_wan.runtime.references import References, Use
from trt_wan.runtime.render import render
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import open_clips

AnyPath = str | PathLike[str]
StepCallback = Callable[["AnimatePipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
OutputType = Literal["np", "uint8", "pil", "path"]
RATE = Fraction(30)  # frames per second of frames that have none: that of the official preprocessing
# Fields of Job that are not in `more`.
OWN = (
    *("inputs", "loras", "references", "prompt", "negative_prompt", "mode", "seed"),
    *RENAMED.values(),
)


@dataclass(frozen=True, eq=False)
class AnimateOutput:
    """`frames` has one video, as diffusers' pipelines give it: float32 [F, H, W, 3] from 0 to 1 ("np"),
    uint8 of 0 to 255 ("uint8"), a list of PIL pictures ("pil"), or the path of the file ("path").
    """

    frames: Sequence[Any]
    fps: float


class AnimatePipeline(Closing):
    """One model, open until `close` or the end of a `with` block. One call at a time."""

    def __init__(self, basis: Basis, progress: Progress = silent) -> None:
        self._basis, self._progress = basis, progress
        self._model: OpenModel | None = None
        self._loras: tuple[Lora, ...] = ()
        self._stopped = self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        folders: AnyPath | Sequence[AnyPath] = (),
        *,
        files: Mapping[Part, AnyPath] | None = None,
        tokenizer: AnyPath | None = None,
        random: str | None = None,
        progress: Progress = silent,
        **settings: Any,
    ) -> Self:
        """The model whose checkpoints are in `folders` or below, of any layout and name; `files` names those
        of single parts. `random` is a model's name in place of files: "14b" or "tiny". `settings` are the
        fields of `Settings`, such as precision, tier and vram. Raises TrtWanError.
        """
        named = (folders,) if isinstance(folders, str | PathLike) else folders
        by_part = {part: Path(file) for part, file in (files or {}).items()}
        weights = WeightFiles(
            tuple(map(Path, named)), by_part, None if tokenizer is None else Path(tokenizer), random
        )
        unknown = settings.keys() - {field.name for field in fields(Settings)}
        if unknown:
            raise unknown_setting(unknown, [field.name for field in fields(Settings)])
        return cls(open_basis(weights, Settings(**settings), progress), progress)

    def __call__(
        self,
        image: Media,
        pose_video: Media = None,
        face_video: Media = None,
        background_video: Media = None,
        mask_video: Media = None,
        prompt: str = DEFAULT_PROMPT,
        negative_prompt: str = DEFAULT_NEGATIVE_PROMPT,
        height: int | None = None,
        width: int | None = None,
        segment_frame_length: int = 77,
        num_inference_steps: int = 20,
        mode: Mode = "animate",
        prev_segment_conditioning_frames: int = 1,
        guidance_scale: float | Sequence[float] = 1.0,
        generator: Any = None,
        output_type: OutputType = "np",
        callback_on_step_end: StepCallback | None = None,
        *,
        driving_video: Media = None,
        init_video: Media = None,
        fps: float | Fraction | None = None,
        flow_shift: float = 5.0,
        output: AnyPath | None = None,
        overwrite: bool = False,
        preprocess: Mapping[str, Any] | None = None,
        reference_images: Sequence[Media] = (),
        reference_as: Use | None = None,
        **more: Any,
    ) -> AnimateOutput:
        """Makes a video as long as its clips.

        `pose_video` and `face_video` are prepared clips. `driving_video` is any video in their place, from
        which they are made first; `preprocess` has fields of `PreprocessJob` and `Networks` for it (detector,
        pose, sam2). Videos are paths, arrays [F, H, W, 3] or lists of pictures; frames that are no file have
        `fps` (30). `height` and `width` are for the clips that are made; prepared ones have theirs.

        `reference_images` are other pictures of the character of `image`, given to the model as
        `reference_as` says (runtime/references.py).

        `generator` is a seed, or a generator of torch on the CPU that nothing was drawn from. `more` are
        other fields of `Job`: sampler, grid, context, nag, colour and so on.

        `callback_on_step_end(pipe, step, timestep, {})` is called after each step, with the step counted from
        0 over all windows. With `output_type` "path" the video is written to `output`, with the clip's sound,
        and frames do not gather in memory. Raises TrtWanError, and Stopped after `stop()`.
        """
        _require_output(output_type, output)
        if unknown := more.keys() - {field.name for field in fields(Job)} | more.keys() & set(OWN):
            raise unknown_setting(unknown, [field.name for field in fields(Job) if field.name not in OWN])
        settings = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "window": segment_frame_length,
            "overlap": prev_segment_conditioning_frames,
            "steps": num_inference_steps,
            "guidance": guidance_scale if isinstance(guidance_scale, int | float) else tuple(guidance_scale),
            "shift": flow_shift,
            "mode": mode,
            "seed": _seed(generator),
            "loras": self._loras,
            **more,
        }
        given = {
            "pose": pose_video,
            "face": face_video,
            "background": background_video,
            "mask": mask_video,
            "init": init_video,
        }
        rate = RATE if fps is None else Fraction(fps).limit_denominator(1001)
        self._stopped = False
        with TemporaryDirectory(prefix="trt-wan-") as name:
            folder = Path(name)
            reference = picture_file(image, "image", folder)
            clips = {
                name: video_file(media, f"{name}_video", folder, rate)
                for name, media in given.items()
                if media is not None
            }
            if driving_video is not None:
                clip = video_file(driving_video, "driving_video", folder, rate)
                inputs = self._prepared(reference, clip, clips, mode, width, height, preprocess, folder)
            else:
                _refuse(preprocess, "preprocess belongs to driving_video.", "Leave it out.")
                known = {**dict.fromkeys(given), **clips}
                inputs = Inputs(reference, known["pose"], known["face"], known["background"], known["mask"])
                inputs = replace(inputs, init=known["init"])
            if not isinstance(reference_images, Iterable):
                raise UsageError("reference_images is no list of pictures.", "Give a list, of 3 at most.")
            if len(reference_images) or reference_as is not None:
                pictures = (
                    picture_file(media, f"reference_{k}", folder)
                    for k, media in enumerate(reference_images, 2)
                )
                settings["references"] = References(tuple(pictures), reference_as or References.use)
            job = Job(inputs, **settings)
            with open_clips(inputs, job.history) as opened:
                _require_size(opened.width, opened.height, width, height)
                self._basis.split(job, opened.frames)  # to refuse it now
                model = self._ready(opened.width, opened.height, job)
                progress = self._watching(job, callback_on_step_end)
                if output is not None:
                    made = render(
                        job,
                        model,
                        Path(output),
                        clips=opened,
                        overwrite=overwrite,
                        progress=progress,
                        should_stop=lambda: self._stopped,
                    )
                    return AnimateOutput([fspath(made.path)], made.rate)
                stream = model.stream(job, clips=opened, progress=progress, should_stop=lambda: self._stopped)
                frames = np.stack(list(stream))
                shown_rate = float(opened.rate)
        if output_type == "pil":
            return AnimateOutput([as_pil(frames)], shown_rate)
        if output_type == "uint8":
            return AnimateOutput([frames], shown_rate)
        return AnimateOutput([frames.astype(np.float32) / 255], shown_rate)

    def load_lora(self, file: AnyPath, strength: float = 1.0) -> None:
        """Adds a LoRA for the calls that follow; only weights that it changes are loaded again. Raises
        WeightsError for a file that this model cannot take.
        """
        self.set_loras([*self._loras, Lora(Path(file), strength)])

    def set_loras(self, loras: Sequence[Lora | AnyPath | tuple[AnyPath, float]]) -> None:
        """The LoRAs for the calls that follow, in place of all others: files, or (file, strength)."""
        made = tuple(_lora(lora) for lora in loras)
        self._basis.require_loras(made)
        self._loras = made

    @property
    def loras(self) -> tuple[Lora, ...]:
        return self._loras

    def stop(self) -> None:
        """Ends the running call with Stopped, after the step or network that runs. For callbacks and other
        threads.
        """
        self._stopped = True

    def close(self) -> None:
        """Frees all memory of the GPU. A second call does nothing."""
        self._closed = True
        if self._model is not None:
            self._model.close()

    @property
    def files(self) -> frozenset[Path]:
        """The files of the weights and of the tokenizer. Random weights have none."""
        return frozenset(file for files in self._basis.weights.files.values() for file in files)

    def _ready(self, width: int, height: int, job: Job) -> OpenModel:
        """The open model, when the graphs of that size exist. Raises TrtWanError."""
        if self._closed:
            raise UsageError("This pipeline is closed.", "Make another with from_pretrained.")
        require_graphs(self._progress, self._basis, width, height, job, build=True)()
        if self._model is None:
            self._model = self._basis.open(export_tiles=tile_exporter(self._basis, build=True))
        return self._model

    def _prepared(
        self,
        reference: Path,
        clip: Path,
        clips: Mapping[str, Path],
        mode: Mode,
        width: int | None,
        height: int | None,
        preprocess: Mapping[str, Any] | None,
        folder: Path,
    ) -> Inputs:
        from trt_wan.api.preparing import prepare
        from trt_wan.preprocess.job import SIZE

        if doubled := clips.keys() - {"init"}:
            raise UsageError(
                f"driving_video and {min(doubled)}_video are given together.",
                "Give the clips that are prepared, or the video from which to make them.",
            )
        size = (SIZE[0] if width is None else width, SIZE[1] if height is None else height)
        made = prepare(reference, clip, folder / "prepared", mode, size, preprocess or {}, self._progress)
        return Inputs.from_folder(made, mode, init=clips.get("init"))

    def _watching(self, job: Job, callback: StepCallback | None) -> Progress:
        if callback is None:
            return self._progress
        timesteps = job.schedule.timesteps

        def progress(event: Event) -> None:
            self._progress(event)
            if not isinstance(event, StepDone):
                return
            step = (event.window - 1) * event.steps + event.step - 1
            if callback(self, step, timesteps[event.step - 1], {}):
                raise UsageError(
                    "callback_on_step_end returned tensors, which no step takes.", "Let it return None or {}."
                )

        return progress


def _require_output(output_type: str, output: AnyPath | None) -> None:
    if output_type not in get_args(OutputType):
        raise UsageError(
            f"There is no output_type {shown(repr(output_type))}.", 'Use "np", "uint8", "pil" or "path".'
        )
    if (output_type == "path") != (output is not None):
        raise UsageError(
            'output_type="path" and output belong together.', 'Give output="video.mp4" with it, or neither.'
        )


def _require_size(width: int, height: int, asked_width: int | None, asked_height: int | None) -> None:
    asked = (width if asked_width is None else asked_width, height if asked_height is None else asked_height)
    if asked != (width, height):
        raise UsageError(
            f"The clips are {width}x{height}, and {asked[0]}x{asked[1]} was asked for.",
            "Leave out width and height, or make the clips in that size with driving_video.",
        )


def _refuse(value: object, message: str, hint: str) -> None:
    if value is not None:
        raise UsageError(message, hint)


def _lora(lora: Lora | AnyPath | tuple[AnyPath, float]) -> Lora:
    if isinstance(lora, Lora):
        return lora
    return Lora(Path(lora)) if isinstance(lora, str | PathLike) else Lora(Path(lora[0]), lora[1])


def _seed(generator: Any) -> int:
    """The seed of a generator of torch, or a seed."""
    if generator is None:
        return Job.seed
    if not hasattr(generator, "initial_seed"):
        return generator  # type: ignore[no-any-return]  # Job checks it
    seed = int(generator.initial_seed())
    fresh = type(generator)(generator.device).manual_seed(seed)
    if generator.device.type != "cpu" or bytes(generator.get_state()) != bytes(fresh.get_state()):
        raise UsageError(
            "The generator is not on the CPU, or numbers were drawn from it.",
            'Give a seed, or torch.Generator("cpu").manual_seed(seed).',
        )
    return seed
