"""`trt-wan preprocess`: from a picture and any clip to the folder that `run --inputs` takes.

Its options are those of `run REF CLIP` too, which prepares the clips on its own.
"""

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command
from trt_wan.cli.cut_options import cut_of, cut_options
from trt_wan.cli.missing import require_exporters
from trt_wan.cli.options import group
from trt_wan.cli.report import Report
from trt_wan.cli.sections import SectionedCommand
from trt_wan.cli.session import current_models
from trt_wan.cli.sizes import size
from trt_wan.errors import GraphError, UsageError, with_commands

if TYPE_CHECKING:
    from trt_wan.preprocess.job import PreprocessJob
    from trt_wan.preprocess.stages import Networks, Stages

Size = tuple[int, int, int, Fraction]  # width, height, frames, frames per second
Planned = Callable[[Size], Callable[[], None]]
NETWORK = click.Path(path_type=Path)  # a file or a folder, checked when it is opened
FILE = click.Path(path_type=Path, dir_okay=False)
# `-` is stdin. A clip may be a folder of pictures, or a pattern that no file has as its name.
PICTURE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
CLIP = click.Path(path_type=Path, allow_dash=True)
STDIN = Path("-")


def _rate(ctx: click.Context, param: click.Parameter, value: str | None) -> Fraction | None:
    if value is None:
        return None
    # No exponents: Fraction("1e99999999") computes for hours.
    if not re.fullmatch(r"[+-]?\d{1,9}(\.\d{1,9}|/0*[1-9]\d{0,8})?", value):
        raise click.BadParameter(f"{value!r} is not a rate such as 16, 29.97 or 30000/1001.")
    return Fraction(value).limit_denominator(1001)


def _numbers(count: int, example: str) -> Callable[..., tuple[float, ...] | None]:
    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(float(number) for number in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != count or not all(abs(number) < 1e6 for number in numbers):
            raise click.BadParameter(f"{value!r} is not {count} pixel numbers such as {example}.")
        return numbers

    return callback


PREPARING = (
    click.option("--size", callback=size, default="832x480", show_default=True, help="Size of the video."),
    click.option(
        "--fit",
        type=click.Choice(["area", "crop", "pad", "stretch"]),
        help="area: as many pixels as --size, in the picture's own shape. The others: exactly --size. "
        "Default: area, with --compat kijai crop.",
    ),
    click.option(
        "--rate", callback=_rate, help="Frames per second. Default: the clip's, official 30, kijai 16."
    ),
    click.option("--person", type=click.IntRange(min=1), help="The person's number, from left to right."),
    click.option(
        "--point", callback=_numbers(2, "410,220"), metavar="X,Y", help="The person at that pixel."
    ),
    click.option(
        "--box", callback=_numbers(4, "300,40,520,470"), metavar="X0,Y0,X1,Y1", help="The person in that box."
    ),
    click.option(
        "--retarget",
        type=click.Choice(["off", "official", "safe"]),
        default="off",
        show_default=True,
        help="Give the movements the reference's proportions (mode animate).",
    ),
    click.option("--edited-reference", type=FILE, help="The reference, posed better, for its proportions."),
    click.option("--edited-driving", type=FILE, help="The driving person, posed better."),
    click.option("--detector", type=NETWORK, help="yolov10m.onnx. Without it, MediaPipe."),
    click.option("--pose", type=NETWORK, help="ViTPose wholebody, an ONNX file or its folder."),
    click.option("--sam2", type=NETWORK, help="SAM2 weights, .pt or .safetensors (mode replace)."),
    click.option(
        "--segmenter",
        type=click.Choice(["auto", "sam2", "mediapipe", "box"]),
        default="auto",
        show_default=True,
        help="The maker of the mask. box: the person's whole box.",
    ),
    click.option("--grow", type=int, help="Pixels that the mask grows, 0 to 512. Default: 10."),
    click.option("--block", type=int, help="Pixels of the mask's blocks, a multiple of 16. Default: 32."),
    click.option("--fill", is_flag=True, help="Fill holes in the mask."),
    click.option(
        "--mask-paint",
        type=FILE,
        help="A picture that corrects the mask of every frame: white adds, black takes away, transparent "
        "pixels leave it.",
    ),
    click.option(
        "--compat",
        type=click.Choice(["official", "kijai"]),
        help="Use the rates, sizes, masks and face crops of the official code or the ComfyUI wrapper. In "
        "run, kijai takes the wrapper's windows and noise too.",
    ),
    click.option("--hands/--no-hands", default=True, help="Draw the hands."),
    click.option("--head/--no-head", default=True, help="Draw the head."),
    click.option("--face/--no-face", default=True, help="Make the face clip."),
    click.option("--face-padding", type=int, default=0, help="Pixels of the clip around the face."),
    click.option("--keypoints", type=FILE, help="An edited keypoints.json, instead of a search for people."),
)  # fmt: skip


reference_background = click.option(
    "--reference-background",
    default="white",
    show_default=True,
    metavar="COLOUR",
    help="Put behind a transparent reference: a name such as grey, or #rrggbb.",
)


preparing_options = group(PREPARING)


@click.command(cls=SectionedCommand, short_help="Prepare the clips of a job.")
@click.argument("reference", type=PICTURE)
@click.argument("clip", type=CLIP)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder to make.",
)
@click.option("--mode", type=click.Choice(["animate", "replace"]), default="animate", show_default=True)
@reference_background
@cut_options
@preparing_options
@click.option(
    "--executor",
    type=click.Choice(["auto", "onnxruntime", "tensorrt"]),
    default="auto",
    show_default=True,
    help="The runtime of the networks.",
)
@click.option("-y", "--overwrite", is_flag=True, help="Replace existing prepared clips.")
@command
def preprocess(*, report: Report, reference: Path, clip: Path, output: Path, **options: Any) -> Any:
    """Find the person in CLIP and make the clips that drive REFERENCE.

    \b
    trt-wan preprocess character.png dance.mp4 -o prepared/
    trt-wan preprocess character.png dance.mp4 -o prepared/ --mode replace --sam2 sam2.1_hiera_base_plus.pt

    CLIP is a video, a GIF or another animation, a folder of numbered pictures or their pattern
    (frames/%04d.png), or - for a video from stdin.

    The folder contains src_ref.png, src_pose.mp4, src_face.mp4, for replace src_bg.mp4 and src_mask.mp4, a
    preview.mp4 for checking, and keypoints.json, which can be edited and used with --keypoints.
    """
    files = ("detector", "pose", "sam2")
    if options["executor"] != "auto" and not any(options[name] for name in files):
        raise UsageError(
            "No network is given, and MediaPipe has a runtime of its own, so --executor would do nothing.",
            "Leave out --executor, or give --detector and --pose, or --sam2.",
        )
    options["cut"] = cut_of(options.pop("start"), options.pop("end"))
    return prepare(report, reference, clip, output, **options)


PREPARING_NAMES = {str(parameter.name) for parameter in preprocess.params} - {
    *("reference", "clip", "output", "mode", "executor", "overwrite", "as_json", "quiet"),
    *("reference_background", "start", "end"),
}

NETWORKS = ("detector", "pose", "sam2", "segmenter")
PREPARING_FILES = (
    "edited_reference",
    "edited_driving",
    "detector",
    "pose",
    "sam2",
    "keypoints",
    "mask_paint",
)


def prepare(
    report: Report,
    reference: Path,
    clip: Path,
    output: Path,
    *,
    executor: Any,
    planned: Planned = lambda size: lambda: None,
    **options: Any,
) -> tuple[Path, dict[str, Any]]:
    """Makes the folder `output`, and keeps it for this process until the command ends. `options` are those of
    PREPARING, mode, overwrite, reference_background, cut.

    `planned` is called with the video's size after all checks that need no network. The function that it
    returns is called when all networks are open, before the clip is read.
    """
    from trt_wan.preprocess.clips.artifacts import ALL, remove_leftovers
    from trt_wan.preprocess.preprocess import preprocess as make
    from trt_wan.preprocess.stages import Networks
    from trt_wan.runtime.video.target import claimed, refuse_inputs

    start = time.perf_counter()
    files = [reference, clip, *(options[name] for name in PREPARING_FILES)]
    for name in ALL:
        refuse_inputs(output / name, files)
    click.get_current_context().with_resource(claimed(output))
    remove_leftovers(output)
    networks = Networks(**{name: options.pop(name) for name in NETWORKS}, executor=executor)
    with _from_stdin(reference, clip) as (reference, clip):
        job = job_of(reference, clip, output, **options)
        begin = planned(_size_of(job))
        stages = open_networks(report, networks, job)
        begin()
        folder = make(job, stages, report.progress)
    made = [str(folder / name) for name in ALL if (folder / name).exists()]
    return folder, {"files": made, "seconds": round(time.perf_counter() - start, 2)}


def refuse_impossible(params: Mapping[str, Any]) -> None:
    """Raises UsageError for options of `preprocess` that are wrong for every clip. Call in its context."""
    options = {name: params[name] for name in (*PREPARING_NAMES, "mode", "reference_background", "overwrite")}
    networks = {name: options.pop(name) for name in NETWORKS}
    options["cut"] = cut_of(params["start"], params["end"])
    job = job_of(params["reference"], params["clip"], params["output"], **options)
    from trt_wan.preprocess.stages import Networks

    Networks(**networks).require_used(job.mode, job.needs_people)


def planned_video(reference: Path, clip: Path, output: Path, **options: Any) -> Size:
    """The size of the clips that `prepare` would make, with its refusals."""
    plain = {name: value for name, value in options.items() if name not in (*NETWORKS, "executor")}
    with _from_stdin(reference, clip) as (reference, clip):
        return _size_of(job_of(reference, clip, output, **plain))


def _size_of(job: "PreprocessJob") -> Size:
    from trt_wan.preprocess.footage import plan_footage
    from trt_wan.preprocess.observe import unobserved
    from trt_wan.preprocess.preprocess import video_size
    from trt_wan.runtime.video.pictures import read_picture

    width, height = video_size(job)
    footage, _ = plan_footage(job, read_picture(job.reference), unobserved)
    return width, height, len(footage.indices), footage.rate


@contextmanager
def _from_stdin(*files: Path) -> Iterator[tuple[Path, ...]]:
    """The files, with a copy of stdin in place of `-`: it is read more than once. The copy is removed."""
    if STDIN not in files:
        yield files
        return
    if files.count(STDIN) > 1 or sys.stdin.isatty():
        raise UsageError(
            "- stands for a file that is piped in, and one can be.",
            with_commands("For example:", "cat dance.mp4 | trt-wan preprocess character.png - -o prepared/"),
        )
    with TemporaryDirectory(prefix="trt-wan-") as folder:
        copy = Path(folder) / "stdin"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        yield tuple(copy if path == STDIN else path for path in files)


def open_networks(report: Report, networks: "Networks", job: "PreprocessJob") -> "Stages":
    """Opens the networks. SAM2's graphs are exported if they are missing."""
    from trt_wan.cli.build_sam2 import build_sam2_for
    from trt_wan.preprocess import stages

    if networks.detector or networks.pose or networks.sam2:
        current_models().make_room()

    def opened() -> "Stages":
        return stages.open_stages(
            networks, job.mode, job.compat, needs_people=job.needs_people, progress=report.progress
        )

    try:
        return opened()
    except GraphError as error:
        if networks.sam2 is None or not error.command:
            raise
        require_exporters(error)
    build_sam2_for(report, str(networks.sam2), (), None, dry_run=False)
    return opened()


def job_of(
    reference: Path,
    clip: Path,
    output: Path,
    *,
    person: int | None,
    point: tuple[float, float] | None,
    box: tuple[float, float, float, float] | None,
    retarget: str,
    grow: int | None,
    block: int | None,
    fill: bool,
    compat: Any,
    reference_background: str,
    **options: Any,
) -> "PreprocessJob":
    from trt_wan.preprocess.job import PreprocessJob
    from trt_wan.preprocess.people.choice import PersonChoice
    from trt_wan.preprocess.people.person import Box
    from trt_wan.preprocess.pictures.masks import MaskShape

    if sum(choice is not None for choice in (person, point, box)) > 1:
        raise UsageError(
            "--person, --point and --box are three ways to choose the person.", "Give one of them."
        )
    return PreprocessJob(
        reference,
        clip,
        output,
        compat=compat,
        choice=PersonChoice(number=person, point=point, box=Box(*box) if box else None),
        retarget=None if retarget == "off" else retarget,  # type: ignore[arg-type]  # click has checked it
        mask=MaskShape(grow, block, fill, compat),
        behind=reference_background,
        **options,
    )
