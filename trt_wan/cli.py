"""The command line: parse, build the dataclass, call one function, print. Nothing heavy is imported to show
help.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.
"""

import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan import __version__
from trt_wan.errors import MemoryShort, OutputError, Stopped, TrtWanError, UsageError
from trt_wan.report import Report, report_for

if TYPE_CHECKING:
    from trt_wan.engines.plan import Plan

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
DEMO_SAMPLE = Path(__file__).parent / "sample"
DEMO_OUTPUT = Path("demo.mp4")
DEMO_WINDOW = 13
DEMO_STEPS = 4


def _size(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d+)[x×](\d+)", value):
        return int(match[1]), int(match[2])
    raise click.BadParameter(f"{value!r} is not a size such as 832x480.")


def command(function: Callable[..., tuple[Path | None, dict[str, Any]]]) -> Callable[..., None]:
    """Gives a command its `report`, and turns what it returns or raises into output and an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Events and the result as JSON lines on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress.")
    @wraps(function)
    def wrapped(as_json: bool, quiet: bool, **options: Any) -> None:
        report = report_for(as_json, quiet)
        try:
            report.done(*function(report=report, **options))
        except BrokenPipeError:
            raise  # nobody reads our stdout any more: click ends quietly
        except (Exception, KeyboardInterrupt) as error:
            told = _told(error)
            report.failed(told)
            if type(told) is TrtWanError:
                raise
            sys.exit(told.exit_code)

    return wrapped


def _told(error: BaseException) -> TrtWanError:
    """What the user is told of an exception; a plain TrtWanError stands for a mistake of ours."""
    notes = " ".join(getattr(error, "__notes__", ()))
    if isinstance(error, TrtWanError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped("Stopped at once.", notes)
    if isinstance(error, MemoryError):
        return MemoryShort(f"The memory is full ({error}).", f"Use a smaller size or window. {notes}".strip())
    if isinstance(error, OSError):
        message = f"{error.filename or 'A file'}: {error.strerror or error}."
        return OutputError(message, f"Check the disk and its rights. {notes}".strip())
    message = f"{type(error).__name__}: {error}"
    return TrtWanError(
        message, f"This is a mistake in trt-wan: please report it, with the lines below. {notes}"
    )


class _Cli(click.Group):
    """A group that reports what click itself refuses as JSON too, when the command line asks for JSON."""

    def invoke(self, ctx: click.Context) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if not as_json:
                raise
            where = error.ctx.command_path if error.ctx else ctx.command_path
            report_for(as_json, quiet=True).failed(UsageError(error.format_message(), f"Run: {where} --help"))
            ctx.exit(UsageError.exit_code)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Wan2.2-Animate: one picture of a character and a driving video in, a finished video out."""


@cli.command(short_help="Make a video.")
@click.option(
    "--inputs",
    type=FOLDER,
    required=True,
    help="Folder of the prepared clips: src_ref.png, src_pose.mp4, src_face.mp4; for replace also "
    "src_bg.mp4, src_mask.mp4.",
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
@click.option("--vram", type=float, help="GB of GPU memory to use at most; blocks stream if they must.")
@click.option(
    "--random-weights", type=click.Choice(["14b", "tiny"]), help="A model of noise instead of --weights."
)
@click.option("-y", "--overwrite", is_flag=True, help="Replace the output if it exists.")
@command
def run(
    *, report: Report, inputs: Path, output: Path, audio: Path | None, overwrite: bool, **options: Any
) -> Any:
    """Make a video from a reference picture and prepared clips.

    \b
    trt-wan run --inputs prepared/ --weights models/ -o out.mp4
    trt-wan run --inputs prepared/ --weights models/ -o out.mp4 --mode replace --steps 6
    """
    from trt_wan.runtime.job import unused_clips

    if unused := unused_clips(inputs, options["mode"]):
        _note(report, f"Not used in the mode {options['mode']}: {', '.join(unused)}.")
    return _render(report, inputs, output, audio, overwrite, **options)


@cli.command(short_help="Export the graphs for a size.")
@click.option("--model", type=click.Choice(["14b", "tiny"]), default="14b", show_default=True)
@click.option(
    "--size",
    callback=_size,
    default="832x480",
    metavar="WxH",
    show_default=True,
    help="Of the video, width x height.",
)
@click.option("--window", type=int, default=77, show_default=True, help="Frames per window, 4k+1.")
@command
def build(*, report: Report, model: str, size: tuple[int, int], window: int) -> Any:
    """Export every network to ONNX for one size and window length. Needs the extra `build`, no weights, no
    GPU.

    \b
    trt-wan build --size 832x480 --window 77
    """
    from trt_wan.engines.plan import Plan

    folder, seconds = _build(report, model, Plan(*size, window))
    data = {
        "graphs": len(seconds),
        "seconds": round(sum(seconds.values()), 2),
        "peak_memory_gb": _peak_memory_gb(),
    }
    if seconds:
        _note(
            report,
            f"{data['graphs']} graphs in {data['seconds']} s, {data['peak_memory_gb']} GB of memory at most",
        )
    return folder, data


@cli.group()
def weights() -> None:
    """Make or inspect checkpoints."""


@weights.command(short_help="Write a complete set of tiny random weights.")
@click.argument("folder", type=FOLDER)
@click.option("--seed", type=int, default=0, show_default=True)
@command
def tiny(*, report: Report, folder: Path, seed: int) -> Any:
    """Write a complete set of tiny random weights to FOLDER, in the formats of the real files."""
    from trt_wan.runtime.checkpoints.tiny import write_tiny_weights

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
    from trt_wan.engines.plan import Plan
    from trt_wan.engines.store import home
    from trt_wan.preprocess.video import Clip
    from trt_wan.runtime.checkpoints.tiny import write_tiny_weights

    _note(report, "The demo's weights are random, so its picture is noise; it shows that everything runs.")
    folder = home() / "weights" / "tiny"
    write_tiny_weights(folder, seed=0)
    pose = Clip(DEMO_SAMPLE / "src_pose.mp4", history=1)
    _build(report, "tiny", Plan(pose.width, pose.height, DEMO_WINDOW))
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


def _render(
    report: Report,
    inputs: Path,
    output: Path,
    audio: Path | None,
    overwrite: bool,
    *,
    weights: Path | None,
    **options: Any,
) -> tuple[Path, dict[str, Any]]:
    from trt_wan.engines.checkpoint import PARTS
    from trt_wan.runtime.job import Inputs, Job, Settings
    from trt_wan.runtime.render import render

    if weights is None and not options.get("random_weights"):
        raise UsageError("There are no weights.", "Name their folder with --weights DIR.")
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: options.pop(name) for name in names if name in options})

    weight_files = {part: file for part in PARTS if (file := options.pop(part, None))}
    given = {
        name: value for name, value in options.items() if value is not None
    }  # the others have Job's defaults
    clips = Inputs.from_folder(inputs, given.get("mode", "animate"))
    job = Job(inputs=clips, weights=weights or Path(), weight_files=weight_files, settings=settings, **given)
    start = time.perf_counter()
    with _stop_between_steps() as should_stop:
        result = render(
            job,
            output,
            sound=audio,
            overwrite=overwrite,
            progress=report.progress,
            should_stop=should_stop,
        )
    data = {"frames": result.frames, "width": result.width, "height": result.height, "fps": result.rate}
    return result.path, {**data, "seconds": round(time.perf_counter() - start, 2)}


def _build(report: Report, model: str, plan: "Plan") -> tuple[Path, dict[str, float]]:
    """The graphs' folder and the seconds of each graph that had to be exported."""
    from trt_wan.engines.config import MODELS
    from trt_wan.engines.store import graphs_folder, is_complete

    folder = graphs_folder(MODELS[model], plan)
    seconds: dict[str, float] = {}
    if is_complete(folder, MODELS[model], plan):
        return folder, seconds

    def exported(name: str, duration: float) -> None:
        seconds[name] = duration
        _note(report, f"exported {name} in {duration:.1f} s")

    try:
        from trt_wan.build.graphs import build_graphs

        return build_graphs(MODELS[model], plan, exported), seconds
    except ImportError as error:  # torch imports onnxscript only when it exports
        raise UsageError(
            f"Exporting graphs needs packages that are not here ({error}).",
            "Run: pip install 'trt-wan[build]'",
        ) from error


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


def _note(report: Report, text: str) -> None:
    from trt_wan.runtime.events import Note

    report.progress(Note(text))


def _peak_memory_gb() -> float | None:
    """Of this process so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def main() -> None:
    cli()
