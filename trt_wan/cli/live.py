"""`trt-wan live`: a camera, a stream or a playing file to a video, while it plays.

The options about the model and the job are those of `run`. It is thin: it opens everything, and calls
runtime/live.
"""

import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command
from trt_wan.cli.missing import require_graphs, tile_exporter
from trt_wan.cli.options import is_typed
from trt_wan.cli.output_options import quality_of
from trt_wan.cli.preprocess import NETWORKS, PREPARING_NAMES, job_of, open_networks
from trt_wan.cli.reference_options import require_others
from trt_wan.cli.report import JsonReport, Report, TextReport
from trt_wan.cli.run import FOLDER, RunOptions, chosen, refuse_preparing, run
from trt_wan.cli.sections import SectionedCommand
from trt_wan.cli.session import current_models
from trt_wan.cli.step_ratios import SHARED, with_ratios
from trt_wan.cli.stopping import stop_at_a_safe_point
from trt_wan.errors import UsageError, shown, with_commands

if TYPE_CHECKING:
    from trt_wan.preprocess.footage import Sizes
    from trt_wan.preprocess.job import PreprocessJob
    from trt_wan.preprocess.stages import PeopleSource
    from trt_wan.runtime.events import Progress
    from trt_wan.runtime.job import Inputs, Job
    from trt_wan.runtime.live.intake import Intake, Pictures
    from trt_wan.runtime.live.live import Feeding
    from trt_wan.runtime.live.outputs import Output
    from trt_wan.runtime.live.sources import Source
    from trt_wan.runtime.video.encoder import Quality

Size = tuple[int, int]
MOST_HOLD = 240  # frames per second
# Options of `run`. Those that need a whole clip, or a length, are left out.
TAKEN = {
    *SHARED,
    "gpus",
    *("overlap", "overwrite", "reference_as", "reference_background", "trim_to_shortest"),
    *("cfg_zero_star", "nag_prompt", "nag_scale", "nag_tau", "nag_alpha"),
    *("pose_strength", "pose_start", "pose_end", "face_strength", "face_start", "face_end"),
    *("clip_image_2", "clip_strength", "clip_strength_2", "clip_tiles", "clip_tile_ratio", "no_clip"),
    *("step_cache", "step_cache_most", "step_cache_retention", "step_cache_ratios"),
    *("colour_match", "colour_anchor", "codec", "crf", "encoder"),
    *("size", "rate", "person", "point", "box", "detector", "pose", "hands", "head", "face", "face_padding"),
}
# Options of `run` that decide nothing about the model and the job.
OTHERS = {
    *("reference", "clip", "inputs", "output", "audio", "overwrite", "paste_back", "dry_run", "resume"),
    *("repeated", "redo", "sidecar", "codec", "crf", "encoder", "frames", "as_json", "quiet"),
}


@dataclass(frozen=True)
class Opened:
    """A live source, and how its pictures become those of the job."""

    source: "Source"
    inputs: "Inputs"
    names: tuple[str, ...]  # the clips'
    size: Size  # the video's, unless it is lowered
    preparing: "Preparing | None" = None  # None: the pictures are prepared


@dataclass(frozen=True)
class Preparing:
    job: "PreprocessJob"
    sizes: "Sizes"
    people: "PeopleSource"


@click.command(cls=SectionedCommand, short_help="Animate a camera or a stream while it plays.")
@click.option(
    "-i",
    "--input",
    "source",
    metavar="CLIP|URL|CAMERA",
    help="A clip, which is played at its own rate, a URL (rtsp://, udp://, tcp://, srt://, ...), a camera "
    "such as /dev/video0, or - for stdin.",
)
@click.option("--inputs", type=FOLDER, help="In place of --input, a folder of prepared clips to be played.")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE|URL|-",
    help="A video file, a URL (rtmp://, rtsp://, udp://, tcp://, srt://), or - for MPEG-TS on stdout.",
)
@click.option(
    "--reference",
    "pictures",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    metavar="PICTURE",
    help="The picture of the character. Given again: other pictures of it, as in run.",
)
@click.option(
    "--hold",
    type=float,
    metavar="FRAMES",
    help="Frames per second to hold: if the model is slower, the steps are lowered, then the size.",
)
@command
def live(
    *,
    report: Report,
    source: str | None,
    inputs: Path | None,
    output: str,
    pictures: tuple[Path, ...],
    hold: float | None,
    **given: Any,
) -> Any:
    """Animate a picture by a camera, a stream or a clip that plays, window after window.

    \b
    trt-wan live --input rtsp://camera/stream --reference character.png --weights models/ -o rtmp://server/key
    trt-wan live --input /dev/video0 --reference character.png --weights models/ -o out.mp4 --hold 16

    A window is sent as soon as it is finished. Where the model is slower than the source, frames are dropped
    evenly; the output keeps the source's rate, and a dropped frame's place shows the frame before it. Ctrl-C
    ends it: the frames that have come are finished.
    """
    from trt_wan.runtime.live.hold import hold as held_with
    from trt_wan.runtime.live.hold import measure
    from trt_wan.runtime.live.intake import Intake
    from trt_wan.runtime.live.live import ArrivingClips, go_live
    from trt_wan.runtime.video.pictures import read_transparent
    from trt_wan.runtime.video.transparency import colour

    _refuse_impossible(report, source, inputs, output, pictures, hold)
    quality, overwrite = _quality(output, given), given["overwrite"]
    others = pictures if inputs is not None else pictures[1:]
    options, preparing = _options(report, given, others)
    require_others(options.references, None if inputs is not None else pictures[0])
    progress = _in_turn(report)
    with ExitStack() as until_the_model_is_closed, ExitStack() as held:
        _claim(held, output, overwrite, [*options.files(), *_played(source, inputs, pictures)], progress)
        models = current_models()
        basis = models.basis(options.weight_files(), options.settings(), progress)
        if inputs is not None:
            opened = _open_prepared(held, options, inputs)
        else:
            assert source is not None, "refused"
            opened = _open_raw(held, report, options, source, pictures[0], preparing, progress)
        job = options.job(opened.inputs)
        basis.require_loras(job.loras)
        job = with_ratios(basis, job, *opened.size, progress)
        require_graphs(progress, basis, *opened.size, job, options.build)()
        model = held.enter_context(models.opened(basis, tile_exporter(basis, options.build)))
        stop = until_the_model_is_closed.enter_context(stop_at_a_safe_point())
        reference = read_transparent(job.inputs.reference).over(colour(job.inputs.behind))

        def measured(job: "Job", size: Size) -> Any:
            require_graphs(progress, basis, *size, job, options.build)()
            return measure(job, model, reference, size, progress, stop.asked)

        rate = _rate(opened.source.rate, preparing["rate"], hold)
        wanted = None if hold is None else float(rate)
        job, size, holds = held_with(job, opened.size, wanted, measured, progress)
        intake = Intake(rate, job.window, job.overlap, holds.window)
        clips = ArrivingClips(job, reference, size, opened.names, intake)
        feed = _feed(held, opened, intake, size, progress)
        target = _output(output, size, rate, quality, overwrite, progress)
        went = go_live(job, model, clips, opened.source, feed, target, progress, stop.asked)
    data = {**asdict(went), "width": size[0], "height": size[1], "fps": float(rate), "steps": job.steps}
    return (None if _is_stream(output) else Path(output)), data


live.params += [parameter for parameter in run.params if parameter.name in TAKEN]


def _refuse_impossible(
    report: Report,
    source: str | None,
    inputs: Path | None,
    output: str,
    pictures: tuple[Path, ...],
    hold: float | None,
) -> None:
    """Raises UsageError for options that do not go together."""
    if (source is None) == (inputs is None):
        raise UsageError(
            "There is no live source." if source is None else "There are two live sources.",
            "Give --input with a clip, a URL or a camera, or --inputs with a folder of prepared clips.",
        )
    if inputs is not None:
        refuse_preparing(None)
    elif not pictures:
        raise UsageError("There is no character to animate.", "Give its picture with --reference PICTURE.")
    if source == "-" and sys.stdin.isatty():
        raise UsageError(
            "- stands for a stream that is piped in, and stdin is a terminal.",
            with_commands(
                "Pipe a stream into it, or name a file that is one:",
                "trt-wan live --input - --reference character.png -o out.mp4 < stream.ts",
            ),
        )
    if output == "-" and isinstance(report, JsonReport):
        raise UsageError(
            "stdout cannot carry the video and the JSON lines.", "Leave out --json, or give another --output."
        )
    if output == "-" and sys.stdout.isatty():
        raise UsageError(
            "- sends the video to stdout, which is a terminal.",
            with_commands("Send it on, for example:", "trt-wan live ... -o - | ffplay -"),
        )
    if hold is not None and not 0 < hold <= MOST_HOLD:
        raise UsageError(
            f"{shown(hold)} frames per second cannot be held.", f"Use --hold with a rate up to {MOST_HOLD}."
        )


def _quality(output: str, given: dict[str, Any]) -> "Quality":
    """Takes the options about the encoding. Raises UsageError for what the output cannot have."""
    from trt_wan.runtime.live.outputs import muxer_of

    codec, crf, encoder = (given.pop(name) for name in ("codec", "crf", "encoder"))
    if not _is_stream(output):
        return quality_of(Path(output), codec, crf, encoder)
    muxer_of(output)
    for name in ("codec", "encoder"):
        if is_typed(name):
            raise UsageError(
                f"A stream is H.264 by the CPU, so --{name} would do nothing.", f"Leave out --{name}."
            )
    return quality_of(Path("stream.mp4"), None, crf, encoder)


def _options(
    report: Report, given: dict[str, Any], others: tuple[Path, ...]
) -> tuple[RunOptions, dict[str, Any]]:
    """The options of `run`, with its defaults for those that are not offered here; and those of the
    preparation.
    """
    defaults = run.make_context("run", ["-o", "live.mp4"]).params
    values = {**defaults, **given, "more_references": others}
    preparing = {name: values.pop(name) for name in PREPARING_NAMES}
    values = {name: value for name, value in values.items() if name not in OTHERS}
    return chosen(report, values, preparing, paste_back=False)[1], preparing


def _in_turn(report: Report) -> "Progress":
    """The report for several threads. Where lines stay, there is one for each window."""
    from trt_wan.runtime.events import Event, StageStarted, StepDone

    lock = threading.RLock()
    lines = isinstance(report, TextReport) and not sys.stderr.isatty()

    def progress(event: Event) -> None:
        if lines and (isinstance(event, StepDone) or (isinstance(event, StageStarted) and event.window)):
            return
        with lock:
            report.progress(event)

    return progress


def _is_stream(output: str) -> bool:
    from trt_wan.runtime.live.outputs import is_stream

    return is_stream(output)


def _played(source: str | None, inputs: Path | None, pictures: tuple[Path, ...]) -> list[Path]:
    """The files that are only read."""
    clips = [*inputs.glob("src_*")] if inputs is not None else [Path(source or "")]
    return [*clips, *pictures]


def _claim(held: ExitStack, output: str, overwrite: bool, files: list[Path], progress: "Progress") -> None:
    """Raises TrtWanError for a file that cannot be written."""
    from trt_wan.runtime.video.target import check_target, claimed, refuse_inputs

    if not _is_stream(output):
        refuse_inputs(Path(output), files)
        check_target(Path(output), overwrite)
        held.enter_context(claimed(Path(output), progress))


def _open_prepared(held: ExitStack, options: RunOptions, folder: Path) -> Opened:
    from trt_wan.runtime.live.live import CLIPS
    from trt_wan.runtime.live.sources import PlayedClip
    from trt_wan.runtime.video.clips import frames_of, open_clips

    inputs = options.inputs(folder)
    clips = held.enter_context(open_clips(inputs, options.job(inputs).history))
    given = {name: clip for name in CLIPS if (clip := getattr(clips, name)) is not None}
    size = clips.width, clips.height

    def pictures(k: int) -> "Pictures":
        return {name: frames_of(clip, [k])[0] for name, clip in given.items()}

    source = PlayedClip(size, clips.frames, clips.rate, pictures)
    held.callback(source.close)
    return Opened(source, inputs, tuple(given), size)


def _open_raw(
    held: ExitStack,
    report: Report,
    options: RunOptions,
    name: str,
    reference: Path,
    preparing: dict[str, Any],
    progress: "Progress",
) -> Opened:
    """Raises TrtWanError for a source or networks that cannot be opened."""
    from trt_wan.preprocess.footage import plan_sizes
    from trt_wan.preprocess.stages import Networks, require_finder
    from trt_wan.runtime.job import Inputs
    from trt_wan.runtime.live.sources import without_password
    from trt_wan.runtime.video.pictures import read_picture

    if options.mode == "replace":
        raise UsageError(
            "The mode replace needs masks, which are made of whole clips.",
            "Use --mode animate, or play clips that are prepared with --inputs DIR.",
        )
    values = {**preparing, "reference_background": options.reference_background, "mode": "animate"}
    networks = Networks(**{each: values.pop(each) for each in NETWORKS}, executor=options.executor or "auto")  # type: ignore[arg-type]
    label = Path(without_password(name))
    job = job_of(reference, label, Path("live"), **values)
    require_finder(networks)
    picture = read_picture(reference)
    source = _open_source(held, name, preparing["rate"], progress)
    job.choice.require_inside(source.width, source.height)
    sizes = plan_sizes(job, picture, source)
    people = open_networks(report, networks, job).people
    assert people is not None, "they are searched for"
    inputs = Inputs(reference, label, label if job.face else None, behind=options.reference_background)
    names = ("pose", "face") if job.face else ("pose",)
    return Opened(source, inputs, names, sizes.canvas, Preparing(job, sizes, people))


def _open_source(held: ExitStack, name: str, rate: Fraction | None, progress: "Progress") -> "Source":
    from trt_wan.runtime.live.sources import FRAME, PlayedClip, Stream, is_stream
    from trt_wan.runtime.video.stills import RATE, open_clip

    if is_stream(name):
        stream = Stream(name, progress)
        held.callback(stream.stop)
        for note in stream.notes:
            progress(note)
        return stream
    clip = open_clip(Path(name), rate=rate or RATE)
    held.callback(clip.close)
    for note in clip.notes:
        progress(note)

    def pictures(k: int) -> "Pictures":
        return {FRAME: clip.window([k])[0]}

    source = PlayedClip((clip.width, clip.height), clip.frames, clip.rate, pictures, clip.times)
    held.callback(source.close)
    return source


def _rate(source: Fraction, asked: Fraction | None, hold: float | None) -> Fraction:
    """Frames per second that are taken of the source."""
    rate = source if asked is None else min(asked, source)
    return rate if hold is None else min(Fraction(hold).limit_denominator(1001), rate)


def _feed(held: ExitStack, opened: Opened, intake: "Intake", size: Size, progress: "Progress") -> "Feeding":
    from trt_wan.runtime.live.live import Feed

    if opened.preparing is None:
        return Feed(intake, None if size == opened.size else size)
    from trt_wan.preprocess.live import LivePreparing

    prepared = opened.preparing
    sizes = replace(prepared.sizes, canvas=size)
    feed = LivePreparing(intake, prepared.people, prepared.job, sizes, progress)
    held.callback(feed.close)
    return feed


def _output(
    output: str, size: Size, rate: Fraction, quality: "Quality", overwrite: bool, progress: "Progress"
) -> "Output":
    if _is_stream(output):
        from trt_wan.runtime.live.outputs import StreamOutput

        return StreamOutput(output, *size, rate, quality.crf)
    from trt_wan.runtime.video.encoder import usable
    from trt_wan.runtime.video.kinds import KINDS
    from trt_wan.runtime.video.writer import VideoWriter

    quality = usable(quality, KINDS[Path(output).suffix.lower()], progress)
    return VideoWriter(Path(output), *size, rate, overwrite=overwrite, quality=quality)
