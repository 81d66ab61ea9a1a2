"""`trt-wan run`: opens the model, runs one job on it, writes the video."""

import os
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.camera_options import camera_options, take_camera
from trt_wan.cli.colour_options import colour_of, colour_options
from trt_wan.cli.command import command, note
from trt_wan.cli.context_options import context_options, take_context
from trt_wan.cli.continue_options import continue_options
from trt_wan.cli.cut_options import cut_of, cut_options
from trt_wan.cli.dry_run import Told, forecast
from trt_wan.cli.guidance_options import guidance_options, guidance_values, guided, with_guidance
from trt_wan.cli.identity_options import found_landmarks, identity_options, require_usable, with_identity
from trt_wan.cli.missing import require_graphs, tile_exporter
from trt_wan.cli.options import gpus_option, is_typed
from trt_wan.cli.output_options import output_options, quality_of
from trt_wan.cli.prepared import FILE as FILE_OF_ORIGIN
from trt_wan.cli.prepared import is_from, origin
from trt_wan.cli.preprocess import (
    CLIP,
    PREPARING_FILES,
    PREPARING_NAMES,
    STDIN,
    Size,
    planned_video,
    prepare,
    preparing_options,
    reference_background,
)
from trt_wan.cli.preprocess import refuse_impossible as refuse_impossible_clips
from trt_wan.cli.preset import with_preset
from trt_wan.cli.redo_options import Redo, redo_of, redo_option
from trt_wan.cli.reference_options import reference_options, require_others, take_references
from trt_wan.cli.repeating import (
    Lasting,
    RepeatableCommand,
    as_typed,
    given_options,
    lasting,
    repeat,
    this_command,
)
from trt_wan.cli.report import Report, TextReport
from trt_wan.cli.sampling_options import refuse_unused_sampling, sampling_options
from trt_wan.cli.session import current_models
from trt_wan.cli.step_cache_options import step_cache_options, take_step_cache
from trt_wan.cli.step_ratios import with_ratios
from trt_wan.cli.stopping import stop_at_a_safe_point
from trt_wan.errors import TrtWanError, UsageError, WeightsError, shown, some_of, with_commands
from trt_wan.runtime.guidance import ClipVision, Nag
from trt_wan.runtime.presets import PRESETS
from trt_wan.runtime.references import References
from trt_wan.runtime.sampling.grids import GRIDS
from trt_wan.runtime.sampling.samplers import SAMPLERS

if TYPE_CHECKING:
    from trt_wan.runtime.camera import Camera
    from trt_wan.runtime.colour import Colour
    from trt_wan.runtime.context.settings import Compat, Context
    from trt_wan.runtime.identity import FaceIdentity
    from trt_wan.runtime.job import Inputs, Job, Lora
    from trt_wan.runtime.opening.model import Basis
    from trt_wan.runtime.settings import Settings, WeightFiles
    from trt_wan.runtime.step_cache import StepCache
    from trt_wan.runtime.video.cut import Cut
    from trt_wan.runtime.video.encoder import Quality

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
FILE_OR_FOLDER = click.Path(path_type=Path, exists=True)
PICTURE = click.Path(path_type=Path, dir_okay=False, exists=True, allow_dash=True)
PARTS = ("transformer", "vae", "text_encoder", "image_encoder")
ALL_PARTS = (*PARTS, "camera_control")
SETTINGS = (
    *("executor", "precision", "tier", "attention_keep", "flavour", "vram", "gpus", "segments", "text_cache"),
)


@dataclass(frozen=True)
class RunOptions:
    """The options of `trt-wan run` about the model and the job. None: the default of Job or Settings."""

    weights: tuple[Path, ...] = ()
    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    image_encoder: Path | None = None
    camera_control: Path | None = None
    tokenizer: Path | None = None
    random_weights: str | None = None
    executor: str | None = None
    precision: str | None = None
    tier: str | None = None
    attention_keep: float | None = None
    flavour: str | None = None
    vram: float | None = None
    gpus: int | None = None
    segments: Mapping[str, str] = field(default_factory=dict)
    text_cache: bool = True
    mode: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | tuple[float, ...] | None = None
    seed: int | None = None
    sampler: str | None = None
    grid: str | None = None
    shift: float | None = None
    window: int | None = None
    overlap: int | None = None
    pose_strength: float | None = None
    face_strength: float | None = None
    loras: "tuple[Lora, ...]" = ()
    colour: "Colour | None" = None
    cut: "Cut | None" = None
    start_frame: Path | None = None
    extend: Path | None = None
    nag: Nag | None = None
    cfg_zero_star: bool = False
    clip_vision: ClipVision = ClipVision()
    references: References | None = None
    pose_start: float | None = None
    pose_end: float | None = None
    face_start: float | None = None
    face_end: float | None = None
    camera: "Camera | None" = None
    identity: "FaceIdentity | None" = None
    lynx: tuple[Path, ...] = ()
    context: "Context | None" = None
    compat: "Compat | None" = None
    trim_to_shortest: bool = False
    reference_background: str = "white"
    init: Path | None = None
    sigmas: tuple[float, ...] = ()
    start_step: int | None = None
    end_step: int | None = None
    denoise_strength: float | None = None
    step_cache: "StepCache | None" = None
    build: bool = True  # whether missing graphs are exported

    def weight_files(self) -> "WeightFiles":
        from trt_wan.runtime.settings import WeightFiles

        files: Any = {part: file for part in ALL_PARTS if (file := getattr(self, part)) is not None}
        return WeightFiles(self.folders(), files, self.tokenizer, self.random_weights, self.lynx)

    def folders(self) -> tuple[Path, ...]:
        """The folders that are searched. Those that are not named are left out for random weights, and where
        every file is named.
        """
        from trt_wan.runtime.weights_folders import searched_folders

        needed = PARTS if self.camera is None else ALL_PARTS
        named = all(getattr(self, part) for part in needed) and self.identity is None
        needless = self.random_weights is not None or named
        return self.weights if needless else searched_folders(self.weights)

    def files(self) -> list[Path]:
        """Files and folders that are only read."""
        named = [getattr(self, name) for name in (*ALL_PARTS, "tokenizer", "start_frame", "extend")]
        loras = [lora.file for lora in self.loras]
        named += [self.clip_vision.second, self.init, *self.lynx]
        named += [] if self.identity is None else [self.identity.picture, self.identity.embedder]
        if self.camera is not None and isinstance(self.camera.render, Path):
            named.append(self.camera.render)
        named += self.references.pictures if self.references else ()
        named += [] if self.step_cache is None else [self.step_cache.file]
        return [*self.weights, *loras, *(path for path in named if path is not None)]

    def settings(self) -> "Settings":
        """A command runs one job, so no weights are kept for another."""
        from trt_wan.runtime.settings import Settings

        return Settings(**self._given(SETTINGS), keep_encoders=False)

    def inputs(self, folder: Path) -> "Inputs":
        from trt_wan.runtime.job import Inputs

        mode: Any = self.mode or "animate"  # click has checked it
        inputs = Inputs.from_folder(
            folder,
            mode,
            trim_to_shortest=self.trim_to_shortest,
            behind=self.reference_background,
            init=self.init,
        )
        return replace(inputs, cut=self.cut, start_frame=self.start_frame, extend=self.extend)

    def job(self, inputs: "Inputs") -> "Job":
        from trt_wan.runtime.job import Job

        return Job(inputs, **self._given([f.name for f in fields(Job) if f.name != "inputs"]))

    def _given(self, names: Any) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _segments(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not NETWORK=CANDIDATE, such as attention=cudnn.")
    pairs = (value.partition("=") for value in values)
    return {network.strip(): candidate.strip() for network, _, candidate in pairs}


def _loras(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> "tuple[Lora, ...]":
    """FILE or FILE:STRENGTH each. Colons inside FILE, as in C:\\x.safetensors, belong to it."""
    if not values:
        return ()
    from trt_wan.runtime.job import Lora

    try:
        return tuple(Lora(*_file_and_strength(value)) for value in values)
    except UsageError as error:
        raise click.BadParameter(f"{error.message} {error.hint}.") from error


def _file_and_strength(value: str) -> tuple[Path, float]:
    """Raises UsageError where no file is named, or a strength that is no number."""
    file, strength = value, 1.0
    if not os.path.isfile(value):
        before, colon, last = value.rpartition(":")
        if colon and before:
            with suppress(ValueError):
                file, strength = before, float(last)
            if file == value and os.path.isfile(before):
                raise _no_strength(before, last)
    if os.path.isdir(file):
        raise UsageError(f"{file!r} is a folder{_loras_in(Path(file))}.", "Name a file: --lora FILE")
    if not os.path.isfile(file):
        before, _, last = file.rpartition(":")
        while before and not os.path.isfile(before):
            before = before.rpartition(":")[0]
        if before:
            raise _no_strength(before, value.removeprefix(f"{before}:"))
        raise UsageError(f"File {file!r} does not exist.", "Write FILE or FILE:STRENGTH")
    return Path(file), strength


def _no_strength(file: str, strength: str) -> UsageError:
    from trt_wan.runtime.job import MOST_LORA_STRENGTH

    return UsageError(
        f"{shown(strength)!r} behind {file!r} is no strength: it is one number from -{MOST_LORA_STRENGTH} to "
        f"{MOST_LORA_STRENGTH}, mostly 1.",
        "Write --lora FILE:STRENGTH, such as --lora FILE:0.8",
    )


def _loras_in(folder: Path) -> str:
    """The LoRAs in a folder, in a sentence after its name."""
    from trt_wan.runtime.preset_loras import loras_below

    try:
        names = [str(path.relative_to(folder)) for path in loras_below(folder)]
    except WeightsError:  # too many files
        return ""
    return f", with the LoRAs {some_of(names)}" if names else ", without a LoRA in it"


def _there(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value != STDIN and "%" not in value.name and not os.path.exists(value):
        raise click.BadParameter(f"File {str(value)!r} does not exist.")
    return value


@click.command(cls=RepeatableCommand, short_help="Make a video.")
@click.argument("reference", type=PICTURE, required=False)
@click.argument("clip", type=CLIP, required=False, callback=_there)
@click.option(
    "--inputs",
    type=FOLDER,
    help="Instead of REFERENCE and CLIP, the folder of the prepared clips: src_ref.png, src_pose.mp4, "
    "src_face.mp4; for replace also src_bg.mp4, src_mask.mp4.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The video to write.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder with the checkpoints, which are known by content; may be repeated.",
)
@click.option("--mode", type=click.Choice(["animate", "replace"]), default="animate", show_default=True)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Settings under a name; options that are given win. "
    + "; ".join(f"{preset.name}: {preset.about}" for preset in PRESETS.values())
    + ".",
)
@click.option(
    "--prompt",
    help="Default: the one the model was trained with. Several with | between them: one for each window, or "
    "each from a time on, '0:00 he walks | 0:05 he dances'.",
)
@click.option("--negative-prompt", help="Read only with a guidance above 1.")
@click.option("--steps", type=int, default=20, show_default=True, help="Denoising steps per window.")
@click.option(
    "--guidance",
    callback=guidance_values,
    default="1.0",
    show_default=True,
    metavar="FLOAT[,FLOAT…]",
    help="Above 1 a step costs twice. A list has a value for each step, and its last one stays: 5,1 guides "
    "the first step alone.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="The noise is that of PyTorch's CPU generator."
)
@click.option(
    "--sampler",
    type=click.Choice(list(SAMPLERS)),
    default="unipc",
    show_default=True,
    help="Users know them from: " + "; ".join(f"{name}: {row.about}" for name, row in SAMPLERS.items()) + ".",
)
@click.option(
    "--grid",
    type=click.Choice(list(GRIDS)),
    default="official",
    show_default=True,
    help="Noise levels, of " + "; ".join(f"{name}: {row.about}" for name, row in GRIDS.items()) + ".",
)
@click.option("--shift", type=float, default=5.0, show_default=True, help="Moves the levels towards noise.")
@click.option("--window", type=int, default=77, show_default=True, help="Frames per window, 4k+1.")
@click.option(
    "--overlap",
    type=int,
    default=1,
    show_default=True,
    help="Frames carried to the next window, 4k+1; the model was trained with 1 and 5.",
)
@context_options
@click.option(
    "--pose-strength", type=float, default=1.0, show_default=True, help="0 leaves the pose clip aside."
)
@click.option(
    "--face-strength", type=float, default=1.0, show_default=True, help="0 leaves the face clip aside."
)
@guidance_options
@camera_options
@identity_options
@sampling_options
@reference_options
@step_cache_options
@reference_background
@click.option(
    "--trim-to-shortest",
    is_flag=True,
    help="Cut longer clips of --inputs to the length of the shortest.",
)
@click.option(
    "--audio", type=FILE, help="File whose sound is copied. Default: the sound of src_pose.mp4, if any."
)
@click.option("--transformer", type=FILE_OR_FOLDER, help="Checkpoint, or its folder, instead of --weights.")
@click.option("--vae", type=FILE_OR_FOLDER, help="The same for the VAE.")
@click.option("--text-encoder", type=FILE_OR_FOLDER, help="The same for umT5.")
@click.option("--image-encoder", type=FILE_OR_FOLDER, help="The same for CLIP.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    callback=_loras,
    metavar="FILE[:STRENGTH]",
    help="LoRA to merge into the transformer, at strength 1 if none is given; may be repeated.",
)
@click.option("--camera-control", type=FILE_OR_FOLDER, help="The same for Uni3C, which --camera needs.")
@click.option("--tokenizer", type=FILE, help="tokenizer.json or spiece.model of umT5.")
@click.option(
    "--executor",
    type=click.Choice(["auto", "onnxruntime", "tensorrt"]),
    default="auto",
    show_default=True,
    help="auto: TensorRT if there is a GPU for it, else ONNX Runtime on the CPU.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8", "int8"]),
    help="Default: fp8 where the GPU has it, else bf16. int8 takes half of bf16's memory on any GPU.",
)
@click.option(
    "--tier",
    type=click.Choice(["exact", "fast", "turbo"]),
    default="exact",
    show_default=True,
    help="exact: attention in bf16; fast: in 8 bits; turbo: also only to the blocks of keys that weigh most.",
)
@click.option(
    "--attention-keep",
    type=float,
    metavar="SHARE",
    help="turbo: the share of the blocks of keys that attention takes exactly, the others by their means. "
    "The first quarter of the steps and the first blocks take all. Default: 0.5.",
)
@click.option(
    "--flavour", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="Default: what suits the GPU."
)
@click.option(
    "--segment",
    "segments",
    multiple=True,
    callback=_segments,
    metavar="NETWORK=CANDIDATE",
    help="Take this candidate, such as attention=cudnn, measured or not; may be repeated.",
)
@click.option(
    "--no-text-cache",
    "text_cache",
    flag_value=False,
    default=True,
    help="Encode the prompt again, and keep nothing of it on the disk.",
)
@click.option("--vram", type=float, help="GB of GPU memory to use at most; blocks stream if they must.")
@gpus_option
@click.option(
    "--random-weights", type=click.Choice(["14b", "tiny"]), help="A model of noise instead of --weights."
)
@click.option(
    "--paste-back", is_flag=True, help="Put the clip's own pixels back around the mask (mode replace)."
)
@click.option(
    "--build/--no-build",
    default=True,
    show_default=True,
    help="Export graphs of this size that are missing, with torch. --no-build: stop at once.",
)
@click.option("-y", "--overwrite", is_flag=True, help="Replace the output if it exists.")
# Long jobs: trt_wan/cli/repeating.py, trt_wan/cli/dry_run.py
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the windows, the memory and time they need, and what would be made. Compute nothing.",
)
@click.option(
    "--resume", is_flag=True, help="Go on after the last finished window of a run that was stopped."
)
@click.option(
    "--from",
    "repeated",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    is_eager=True,
    callback=repeat,
    metavar="VIDEO",
    help="Use the files and options of this video of trt-wan, or of its .json; options that are given win.",
)
@redo_option
@click.option(
    "--sidecar/--no-sidecar",
    default=True,
    show_default=True,
    help="Write all that is needed to repeat the run beside the video too, as .json.",
)
@colour_options
@continue_options
@output_options
@cut_options
@preparing_options
@command
def run(
    *,
    report: Report,
    reference: Path | None,
    clip: Path | None,
    inputs: Path | None,
    output: Path,
    audio: Path | None,
    overwrite: bool,
    paste_back: bool,
    dry_run: bool,
    codec: str | None,
    crf: int | None,
    encoder: str,
    frames: Path | None,
    **given: Any,
) -> Any:
    """Make a video from a picture of the character, REFERENCE, and a driving video, CLIP.

    \b
    trt-wan run character.png dance.mp4 --weights models/ -o out.mp4
    trt-wan run --inputs prepared/ --weights models/ -o out.mp4 --mode replace --steps 6

    The clips are prepared into the folder out.inputs beside the output, as `trt-wan preprocess` does, with
    the same options. Graphs of this size that are missing are exported first.
    """
    from trt_wan.runtime.job import unused_clips
    from trt_wan.runtime.kept.windows import forget_finished
    from trt_wan.runtime.video.encoder import usable
    from trt_wan.runtime.video.frame_folder import require_free
    from trt_wan.runtime.video.kinds import KINDS
    from trt_wan.runtime.video.sound import require_sound
    from trt_wan.runtime.video.target import refuse_inputs, require_audible

    preparing = {name: given.pop(name) for name in PREPARING_NAMES}
    long = {name: given.pop(name) for name in ("resume", "sidecar", "repeated")}
    redo = redo_of(given.pop("redo"), long["repeated"], given)
    made, options = chosen(report, given, preparing, paste_back)
    require_others(options.references, reference)
    if redo is not None:
        options = replace(options, seed=redo.record.job.get("seed"))  # that of the other windows
    files = [reference, clip, audio, *options.files(), *(preparing[name] for name in PREPARING_FILES)]
    refuse_inputs(output, [*files, *(inputs.glob("src_*") if inputs else ())])
    require_usable(options.identity, preparing["detector"], preparing["pose"])
    written: dict[str, Any] = {"audio": audio, "overwrite": overwrite, "paste_back": paste_back}
    written |= {"quality": quality_of(output, codec, crf, encoder), "frames": frames}
    if not dry_run:
        forget_finished(output)
        if (kind := KINDS.get(output.suffix.lower())) is not None:  # others are refused later
            written["quality"] = usable(written["quality"], kind, report.progress)
    if frames is not None:
        if frames.absolute() == output.absolute():
            raise UsageError("The frames and the video have the same name.", "Give --frames a folder.")
        require_free(frames, overwrite)
    if audio is not None:
        require_audible(output)
        require_sound(audio)
    if inputs is not None:
        refuse_preparing(reference)
        if dry_run:
            job = options.job(options.inputs(inputs))
            return _forecast(report, job, output, options, overwrite, _size_of(job), redo)
        options = _with_landmarks(report, options, preparing)
        if unused := unused_clips(inputs, options.mode):  # type: ignore[arg-type]  # click has checked it
            note(report, f"Not used in the mode {options.mode}: {', '.join(unused)}.")
        return render_prepared(
            report, inputs, output, options, **written, lasting=lasting(made, inputs, **long), redo=redo
        )
    if reference is None or clip is None:
        raise UsageError(
            "There is nothing to make a video from.",
            "Give a picture and a driving video, or prepared clips with --inputs DIR.",
        )
    if dry_run:
        job = _job_to_prepare(output, preparing, options)
        shared = {
            "mode": options.mode,
            "reference_background": options.reference_background,
            "cut": options.cut,
        }
        folder = job.inputs.reference.parent
        size = planned_video(reference, clip, folder, overwrite=overwrite, **shared, **preparing)
        _require_fit(job, *size)
        return _forecast(report, job, output, options, overwrite, size)
    options = _with_landmarks(report, options, preparing)
    inputs, basis = _prepare_beside(
        report, reference, clip, output, overwrite, preparing, options, long["resume"]
    )
    options = replace(options, cut=None)  # the prepared clips have those frames alone
    try:
        left = lasting(made, inputs, **long)
        return render_prepared(report, inputs, output, options, **written, basis=basis, lasting=left)
    except TrtWanError as error:
        error.add_hint(f"The prepared clips can be used again: --inputs {shlex.quote(str(inputs))}")
        raise


def _with_landmarks(report: Report, options: RunOptions, preparing: Mapping[str, Any]) -> RunOptions:
    """With the landmarks of the identity, which a video of --from then has too."""
    if options.identity is None or options.identity.landmarks or not options.identity.acts:
        return options
    identity = found_landmarks(report, options.identity, preparing["detector"], preparing["pose"])
    as_typed("identity_landmarks", ",".join(map(str, identity.landmarks)))
    return replace(options, identity=identity)


def chosen(
    report: Report, given: dict[str, Any], preparing: Mapping[str, Any], paste_back: bool
) -> tuple[dict[str, Any], RunOptions]:
    """The values of all options about the model and the job, with those of a preset. Raises TrtWanError."""
    given["colour"] = colour_of(given.pop("colour_match"), given.pop("colour_anchor"))
    given["cut"] = cut_of(given.pop("start"), given.pop("end"))
    refuse_unused_sampling()
    context, references, step_cache = take_context(given), take_references(given), take_step_cache(given)
    compat: Compat | None = "kijai" if preparing["compat"] == "kijai" else None
    camera = take_camera(given)
    made = with_identity(with_guidance(with_preset(report, given.pop("preset"), given)))
    made |= {"camera": camera, "references": references, "step_cache": step_cache}
    options = RunOptions(**made, context=context, compat=compat)
    if paste_back and options.mode == "animate":
        raise UsageError(
            "In the mode animate there is nothing to paste back.",
            "Leave out --paste-back, or use --mode replace.",
        )
    if options.seed is not None and options.seed < 0:  # -1 is a random seed in other programs
        raise UsageError(
            f"The seed {shown(options.seed)} is not a number from 0 to {2**64 - 1}, and none is random.",
            "For another video each time use --seed $RANDOM. PyTorch's negative seeds are large ones: here "
            f"--seed {options.seed % 2**64}.",
        )
    if is_typed("negative_prompt") and not guided(options.guidance):
        raise UsageError(
            "Without guidance --negative-prompt would do nothing.", "Add --guidance 5, or leave it out."
        )
    return made, options


def refuse_impossible(params: Mapping[str, Any]) -> RunOptions:
    """Raises TrtWanError for options of `run` that are wrong for every clip. Call in its context."""
    given = dict(params)
    reference, _ = given.pop("reference"), given.pop("clip")
    if given.pop("inputs") is not None:
        refuse_preparing(reference)
    for name in ("as_json", "quiet", "repeated", "resume", "sidecar", "redo", "audio"):
        given.pop(name)
    for name in ("overwrite", "dry_run", "frames"):
        given.pop(name)
    output, paste_back = given.pop("output"), given.pop("paste_back")
    codec, crf, encoder = (given.pop(name) for name in ("codec", "crf", "encoder"))
    preparing = {name: given.pop(name) for name in PREPARING_NAMES}
    _, options = chosen(TextReport(quiet=True), given, preparing, paste_back)
    require_others(options.references, reference)
    quality_of(output, codec, crf, encoder)
    _job_to_prepare(output, preparing, options)
    if reference is not None:
        refuse_impossible_clips(params)
    options.settings()
    return options


def render_prepared(
    report: Report,
    folder: Path,
    output: Path,
    options: RunOptions,
    audio: Path | None = None,
    overwrite: bool = False,
    paste_back: bool = False,
    quality: "Quality | None" = None,
    frames: Path | None = None,
    basis: "Basis | None" = None,
    lasting: Lasting = Lasting(sidecar=False),  # noqa: B008  (frozen)
    redo: Redo | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Makes the video of the prepared clips in `folder`, and before it the graphs that are missing.

    All files are checked before that. `basis` is the options', if it is open already.
    """
    from trt_wan.runtime.events import silent
    from trt_wan.runtime.kept.made import record_of
    from trt_wan.runtime.kept.record import as_values
    from trt_wan.runtime.kept.windows import kept_of
    from trt_wan.runtime.redo import redo as render_again
    from trt_wan.runtime.render import own_sound, render
    from trt_wan.runtime.step_cache import numbers, told_skips
    from trt_wan.runtime.video.clips import open_clips
    from trt_wan.runtime.video.continued import frames_before
    from trt_wan.runtime.video.encoder import Quality
    from trt_wan.runtime.video.target import check_target, claimed

    start, models = time.perf_counter(), current_models()
    job = options.job(options.inputs(folder))
    files, settings = options.weight_files(), options.settings()
    check_target(output, overwrite)
    with (
        claimed(output, silent if lasting.resume else report.progress),
        open_clips(job.inputs, job.history) as clips,
        ExitStack() as until_the_model_is_closed,
    ):
        frames_before(job.inputs, job.overlap, clips.width, clips.height, clips.rate)  # to refuse it now
        again = [] if redo is None else redo.planned(job, clips)
        basis = basis or models.basis(files, settings, report.progress)
        basis.require_loras(job.loras)
        job = with_ratios(basis, job, clips.width, clips.height, report.progress)
        basis.split(job, clips.frames)  # to refuse it now
        require_graphs(report.progress, basis, clips.width, clips.height, job, options.build)()
        written = {"kind": output.suffix.lower(), "paste_back": paste_back}
        written |= as_values(quality or Quality())
        sound = audio or own_sound(clips)
        record = record_of(job, clips, basis, sound, written, lasting.options, lasting.paths)
        if lasting.repeated is not None:
            lasting.repeated.check(report, record, given_options(), redo is not None)
        if redo is not None:
            redo.tell(report, again)
            record = redo.in_record(record)
        if kept_of(output) and not lasting.resume and redo is None:
            text = with_commands("An earlier run can be gone on with:", this_command("--resume"))
            note(report, text, "can_resume")
        with models.opened(basis, tile_exporter(basis, options.build)) as model:
            stop = until_the_model_is_closed.enter_context(stop_at_a_safe_point())
            go_on = with_commands("Go on after the last finished window:", this_command("--resume"))
            try:
                shared: Any = {
                    "clips": clips,
                    "overwrite": overwrite,
                    "paste_back": paste_back,
                    "quality": quality,
                    "record": record,
                    "sidecar": lasting.sidecar,
                    "progress": stop.watching(report.progress),
                    "should_stop": stop.asked,
                }
                if redo is not None:
                    result = render_again(job, model, output, redo.video, again, **shared)
                else:
                    long: Any = {"sound": audio, "frames": frames, "resume": lasting.resume}
                    result = render(job, model, output, **long, **shared)
            except TrtWanError as error:
                if redo is not None:
                    error.add_hint(f"{redo.video} is as it was.")
                # A hint with --resume is of a state that is damaged: going on would fail in the same way.
                elif kept_of(output) and not isinstance(error, UsageError) and "--resume" not in error.hint:
                    error.add_hint(go_on)
                raise
            except (KeyboardInterrupt, MemoryError) as error:
                if kept_of(output) and redo is None:
                    error.add_note(go_on)
                raise
        if stop.asked():
            note(report, "The video was finished before it could be stopped.", code="not_stopped")
    data: dict[str, Any] = {"frames": result.frames, "width": result.width, "height": result.height}
    data["fps"] = result.rate
    if skips := job.skips:
        note(report, f"The step cache has skipped {told_skips(skips)}, in every window.", "steps_skipped")
        data["skipped_steps"] = [numbers(side) for side in skips]
    return result.path, {**data, "seconds": round(time.perf_counter() - start, 2)}


def _prepare_beside(
    report: Report,
    reference: Path,
    clip: Path,
    output: Path,
    overwrite: bool,
    preparing: dict[str, Any],
    options: RunOptions,
    resume: bool,
) -> "tuple[Path, Basis]":
    """The folder of clips made from `reference` and `clip`. Before that, everything that can be refused is
    checked, and the graphs and engines that are missing are made.
    """
    from trt_wan.engines.shape import Plan
    from trt_wan.engines.store.files import replace_atomically
    from trt_wan.preprocess.clips import artifacts
    from trt_wan.runtime.events import silent
    from trt_wan.runtime.kept.windows import ANEW, kept_of
    from trt_wan.runtime.video.target import check_target, claimed

    check_target(output, overwrite)
    job = _job_to_prepare(output, preparing, options)
    folder = job.inputs.reference.parent
    files, settings = options.weight_files(), options.settings()
    click.get_current_context().with_resource(claimed(output, silent if resume else report.progress))
    basis = current_models().basis(files, settings, report.progress)
    basis.require_loras(job.loras)

    def planned(size: Size) -> Callable[[], None]:
        _require_fit(job, *size)
        width, height, frames, _ = size
        basis.split(job, frames)  # to refuse it now
        with_ratios(basis, job, width, height, silent)
        export = require_graphs(report.progress, basis, width, height, job, options.build)

        def make() -> None:
            export()
            plan = Plan(width, height, job.model_window, basis.precision)
            basis.make_engines(plan, job, report.progress)

        return make

    shared = {
        "mode": options.mode,
        "executor": options.executor,
        "overwrite": overwrite,
        "reference_background": options.reference_background,
        "cut": options.cut,
    }
    from_these = origin(reference, clip, {**preparing, **shared, "overwrite": False})
    if resume and is_from(folder, from_these) and (folder / artifacts.REFERENCE).exists():
        note(report, f"The prepared clips in {folder} are used again.", "prepared_before")
        return folder, basis
    if resume and from_these is not None and kept_of(output) and (folder / FILE_OF_ORIGIN).exists():
        raise UsageError(
            f"The clips in {folder} are of another picture or clip, or were made with other options.",
            f"Go on with those that the run was begun with. {ANEW}",
        )
    made, _ = prepare(report, reference, clip, folder, **shared, planned=planned, **preparing)
    if from_these is not None:
        replace_atomically(folder / FILE_OF_ORIGIN, from_these)
    return made, basis


def _job_to_prepare(output: Path, preparing: dict[str, Any], options: RunOptions) -> "Job":
    """The job whose clips will be in the folder beside `output`."""
    from trt_wan.preprocess.clips import artifacts
    from trt_wan.runtime.job import Inputs

    folder = output.with_name(f"{output.stem}.inputs")
    face = folder / artifacts.FACE if preparing["face"] else None
    background, mask = (
        folder / name if options.mode == "replace" else None
        for name in (artifacts.BACKGROUND, artifacts.MASK)
    )
    prepared = Inputs(
        folder / artifacts.REFERENCE, folder / artifacts.POSE, face, background, mask, init=options.init
    )
    return options.job(replace(prepared, start_frame=options.start_frame, extend=options.extend))


def _require_fit(job: "Job", width: int, height: int, frames: int, rate: Fraction) -> None:
    """Raises InputError for videos that do not fit to the clips, before those are made."""
    from trt_wan.runtime.video.clips import require_init_size
    from trt_wan.runtime.video.continued import frames_before

    frames_before(job.inputs, job.overlap, width, height, rate)
    if job.inputs.init is not None:
        require_init_size(job.inputs.init, width, height, frames)


def _size_of(job: "Job") -> Size:
    """The size of prepared clips."""
    from trt_wan.runtime.video.clips import open_clips

    with open_clips(job.inputs, job.history) as clips:
        return clips.width, clips.height, clips.frames, clips.rate


def _forecast(
    report: Report,
    job: "Job",
    output: Path,
    options: RunOptions,
    overwrite: bool,
    size: Size,
    redo: Redo | None = None,
) -> Told:
    """Raises TrtWanError as the run itself would."""
    from trt_wan.runtime.opening.model import open_basis
    from trt_wan.runtime.video.clips import open_clips
    from trt_wan.runtime.video.target import check_target

    width, height, frames, rate = size
    check_target(output, overwrite)
    basis = open_basis(options.weight_files(), options.settings(), report.progress)
    basis.require_loras(job.loras)
    job = with_ratios(basis, job, width, height, report.progress)
    require_graphs(report.progress, basis, width, height, job, options.build)
    if is_typed("resume"):
        note(
            report,
            "The forecast is of all windows, also of those that --resume goes on after.",
            "all_windows",
        )
    again = None
    if redo is not None:
        with open_clips(job.inputs, job.history) as clips:
            again = redo.planned(job, clips)
    return forecast(basis, job, width, height, frames, rate, again)


def refuse_preparing(reference: Path | None) -> None:
    """With --inputs nothing is prepared: an option about it would be left aside in silence."""
    given = "REFERENCE and CLIP" if reference else ""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name == "compat" and context.params["compat"] == "kijai":
            continue  # it is about the windows too
        finds_a_face = context.params.get("identity") is not None and parameter.name in ("detector", "pose")
        if parameter.name in PREPARING_NAMES and is_typed(parameter.name) and not finds_a_face:
            off = context.params[parameter.name] is False
            given = given or (parameter.secondary_opts if off else parameter.opts)[0]
    if given:
        raise UsageError(
            f"--inputs names clips that are prepared already, so {given} would do nothing.",
            f"Leave out {given}, or --inputs.",
        )
