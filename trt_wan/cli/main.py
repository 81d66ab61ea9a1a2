"""The command line: parse, build the dataclass, call one function, print. Nothing heavy is imported to show
help.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.
"""

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan import __version__
from trt_wan.cli.bench import bench
from trt_wan.cli.build import build, build_for
from trt_wan.cli.command import Group, command, note
from trt_wan.cli.engines import list_engines, remove_engines, show_engine
from trt_wan.cli.preprocess import PREPARING_NAMES, prepare, preparing_options, preprocess
from trt_wan.cli.report import Report
from trt_wan.errors import TrtWanError, UsageError

if TYPE_CHECKING:
    from trt_wan.runtime.job import Inputs, Job

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
DEMO_SAMPLE = Path(__file__).parents[1] / "sample"
DEMO_OUTPUT = Path("demo.mp4")
DEMO_WINDOW = 13
DEMO_STEPS = 4


def _segments(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not NETWORK=CANDIDATE, such as attention=cudnn.")
    pairs = (value.partition("=") for value in values)
    return {network.strip(): candidate.strip() for network, _, candidate in pairs}


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Wan2.2-Animate: one picture of a character and a driving video in, a finished video out."""


for subcommand in (build, bench, preprocess, list_engines, show_engine, remove_engines):
    cli.add_command(subcommand)


@cli.command(short_help="Make a video.")
@click.argument("reference", type=FILE, required=False)
@click.argument("clip", type=FILE, required=False)
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
@click.option("--weights", type=FOLDER, help="Folder with the checkpoints; files are known by content.")
@click.option("--mode", type=click.Choice(["animate", "replace"]), default="animate", show_default=True)
@click.option("--prompt", help="Default: the one the model was trained with.")
@click.option("--negative-prompt", help="Read only with a guidance above 1.")
@click.option("--steps", type=int, default=20, show_default=True, help="Denoising steps per window.")
@click.option(
    "--guidance", type=float, default=1.0, show_default=True, help="Above 1 every step costs twice."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="The noise is that of PyTorch's CPU generator."
)
@click.option("--sampler", type=click.Choice(["unipc", "euler"]), default="unipc", show_default=True)
@click.option(
    "--grid",
    type=click.Choice(["official", "linear", "diffusers", "simple"]),
    default="official",
    show_default=True,
    help="Noise levels: of the official code's UniPC or DPM++, of diffusers, or ComfyUI's simple.",
)
@click.option("--shift", type=float, default=5.0, show_default=True, help="Moves the levels towards noise.")
@click.option("--window", type=int, default=77, show_default=True, help="Frames per window, 4k+1.")
@click.option(
    "--overlap", type=int, default=1, show_default=True, help="Frames carried to the next window: 1 or 5."
)
@click.option("--pose-strength", type=float, default=1.0, show_default=True)
@click.option("--face-strength", type=float, default=1.0, show_default=True)
@click.option(
    "--audio", type=FILE, help="File whose sound is copied. Default: the sound of src_pose.mp4, if any."
)
@click.option("--transformer", type=FILE, help="Checkpoint to use instead of the one in --weights.")
@click.option("--vae", type=FILE)
@click.option("--text-encoder", type=FILE)
@click.option("--image-encoder", type=FILE)
@click.option("--tokenizer", type=FILE, help="tokenizer.json or spiece.model of umT5.")
@click.option(
    "--executor",
    type=click.Choice(["auto", "onnxruntime", "tensorrt"]),
    default="auto",
    show_default=True,
    help="auto: TensorRT if there is a GPU for it, else ONNX Runtime on the CPU.",
)
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp8"]), help="Default: the best the GPU has."
)
@click.option(
    "--tier",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="exact: attention in bf16; fast: in 8 bits.",
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
    help="Take this candidate, such as attention=cudnn, whatever was measured; may be repeated.",
)
@click.option("--vram", type=float, help="GB of GPU memory to use at most; blocks stream if they must.")
@click.option(
    "--random-weights", type=click.Choice(["14b", "tiny"]), help="A model of noise instead of --weights."
)
@click.option(
    "--paste-back", is_flag=True, help="Put the clip's own pixels back around the mask (mode replace)."
)
@click.option("-y", "--overwrite", is_flag=True, help="Replace the output if it exists.")
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
    **options: Any,
) -> Any:
    """Make a video from a picture of the character, REFERENCE, and a driving video, CLIP.

    \b
    trt-wan run character.png dance.mp4 --weights models/ -o out.mp4
    trt-wan run --inputs prepared/ --weights models/ -o out.mp4 --mode replace --steps 6

    The clips are prepared into the folder out.inputs beside the output, as `trt-wan preprocess` does; its
    options are the last ones below.
    """
    from trt_wan.runtime.job import unused_clips

    if options["paste_back"] and options["mode"] == "animate":
        raise UsageError(
            "In the mode animate there is nothing to paste back.",
            "Leave out --paste-back, or use --mode replace.",
        )
    preparing = {name: options.pop(name) for name in PREPARING_NAMES}
    if inputs is None:
        inputs = _prepare_beside(report, reference, clip, output, overwrite, preparing, options)
        try:
            return _render(report, inputs, output, audio, overwrite, **options)
        except TrtWanError as error:
            error.hint = f"{error.hint} The prepared clips can be used again: --inputs {inputs}".strip()
            raise
    _refuse_preparing(reference)
    if unused := unused_clips(inputs, options["mode"]):
        note(report, f"Not used in the mode {options['mode']}: {', '.join(unused)}.")
    return _render(report, inputs, output, audio, overwrite, **options)


def _prepare_beside(
    report: Report,
    reference: Path | None,
    clip: Path | None,
    output: Path,
    overwrite: bool,
    preparing: dict[str, Any],
    options: dict[str, Any],
) -> Path:
    """The folder of clips made from `reference` and `clip`; what the job itself refuses is refused before."""
    from fractions import Fraction

    from trt_wan.preprocess.clips import artifacts
    from trt_wan.runtime.job import Inputs
    from trt_wan.runtime.video.writer import VideoWriter

    if reference is None or clip is None:
        raise UsageError(
            "There is nothing to make a video from.",
            "Give a picture and a driving video, or prepared clips with --inputs DIR.",
        )
    folder = output.with_name(f"{output.stem}.inputs")
    options = {name: value for name, value in options.items() if name != "paste_back"}
    face = folder / artifacts.FACE if preparing["face"] else None
    hole = (folder / artifacts.BACKGROUND, folder / artifacts.MASK) if options["mode"] == "replace" else ()
    _job(Inputs(folder / artifacts.REFERENCE, folder / artifacts.POSE, face, *hole), **options)
    VideoWriter(output, 16, 16, Fraction(1), overwrite=overwrite).abandon(keep=False)
    shared = {"mode": options["mode"], "executor": options["executor"], "overwrite": overwrite}
    made, _ = prepare(report, reference, clip, folder, **shared, **preparing)
    return made


def _refuse_preparing(reference: Path | None) -> None:
    """With --inputs nothing is prepared: an option about it would be left aside in silence."""
    given = "REFERENCE and CLIP" if reference else ""
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in PREPARING_NAMES and source is click.core.ParameterSource.COMMANDLINE:
            off = context.params[parameter.name] is False
            given = given or (parameter.secondary_opts if off else parameter.opts)[0]
    if given:
        raise UsageError(
            f"--inputs names clips that are prepared already, so {given} would do nothing.",
            f"Leave out {given}, or --inputs.",
        )


@cli.group()
def weights() -> None:
    """Make or inspect checkpoints."""


@weights.command(short_help="Write a complete set of tiny random weights.")
@click.argument("folder", type=FOLDER)
@click.option("--seed", type=int, default=0, show_default=True)
@command
def tiny(*, report: Report, folder: Path, seed: int) -> Any:
    """Write a complete set of tiny random weights to FOLDER, in the formats of the real files."""
    from trt_wan.runtime.weights.tiny import write_tiny_weights

    paths = write_tiny_weights(folder, seed)
    return folder, {
        "files": [str(path) for path in paths],
        "bytes": sum(path.stat().st_size for path in paths),
    }


@cli.command(short_help="Run everything once, small, with random weights.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=DEMO_OUTPUT, show_default=True
)
@command
def demo(*, report: Report, output: Path) -> Any:
    """Make tiny random weights and graphs in the cache and run the whole pipeline on the sample."""
    from trt_wan.engines.store.home import home
    from trt_wan.runtime.video.reader import Clip
    from trt_wan.runtime.weights.tiny import write_tiny_weights

    note(report, "The demo's weights are random, so its picture is noise; it shows that everything runs.")
    folder = home() / "weights" / "tiny"
    write_tiny_weights(folder, seed=0)
    pose = Clip(DEMO_SAMPLE / "src_pose.mp4", history=1)
    build_for(report, "tiny", (pose.width, pose.height), DEMO_WINDOW, measure=False)
    driving = DEMO_SAMPLE / "driving.mp4"
    return _render(
        report,
        DEMO_SAMPLE,
        output,
        driving,
        output == DEMO_OUTPUT,
        weights=folder,
        window=DEMO_WINDOW,
        steps=DEMO_STEPS,
    )


def _job(inputs: "Inputs", *, weights: Path | None, **options: Any) -> "Job":
    from trt_wan.engines.checkpoint import PARTS
    from trt_wan.runtime.job import Job, Settings

    if weights is None and not options.get("random_weights"):
        raise UsageError("There are no weights.", "Name their folder with --weights DIR.")
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: options.pop(name) for name in names if name in options})
    weight_files = {part: file for part in PARTS if (file := options.pop(part, None))}
    given = {
        name: value for name, value in options.items() if value is not None
    }  # the others have Job's defaults
    return Job(
        inputs=inputs, weights=weights or Path(), weight_files=weight_files, settings=settings, **given
    )


def _render(
    report: Report,
    folder: Path,
    output: Path,
    audio: Path | None,
    overwrite: bool,
    *,
    paste_back: bool = False,
    **options: Any,
) -> tuple[Path, dict[str, Any]]:
    from trt_wan.runtime.job import Inputs
    from trt_wan.runtime.render import render

    job = _job(Inputs.from_folder(folder, options.get("mode", "animate")), **options)
    start = time.perf_counter()
    with _stop_between_steps() as should_stop:
        result = render(
            job,
            output,
            sound=audio,
            overwrite=overwrite,
            paste_back=paste_back,
            progress=report.progress,
            should_stop=should_stop,
        )
    data = {"frames": result.frames, "width": result.width, "height": result.height, "fps": result.rate}
    return result.path, {**data, "seconds": round(time.perf_counter() - start, 2)}


@contextmanager
def _stop_between_steps() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C ends the job after the step under way, the second at once."""
    pressed = False

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        os.write(2, b"\nStopping after this step; press Ctrl-C again to stop at once.\n")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    cli()
