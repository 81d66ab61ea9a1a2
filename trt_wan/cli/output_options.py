"""`--codec`, `--crf`, `--encoder` and `--frames` of `run`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trt_wan.cli.options import group

if TYPE_CHECKING:
    from trt_wan.runtime.video.encoder import Quality

CODECS = ("h264", "hevc", "av1", "vp9", "prores")  # a test compares them with the runtime's
ENCODERS = ("auto", "cpu", "nvenc")

OUTPUT = (
    click.option(
        "--codec",
        type=click.Choice(CODECS),
        help="Of the pictures. Default: h264, in a .webm vp9. hevc goes into .mp4, .mov, .mkv; av1 into "
        ".mp4, .mkv, .webm; prores (422 HQ) into .mov.",
    ),
    click.option(
        "--crf",
        type=int,
        help="Quality on the codec's own scale: lower is better, and larger. Default: h264 and hevc 18, "
        "av1 16, vp9 24.",
    ),
    click.option(
        "--encoder",
        type=click.Choice(ENCODERS),
        default="auto",
        show_default=True,
        help="nvenc: the card's (h264_nvenc, hevc_nvenc), or the CPU's where it has none; its --crf is a "
        "constant quantiser. auto: the CPU's.",
    ),
    click.option(
        "--frames",
        type=click.Path(path_type=Path, file_okay=False),
        help="A folder for all frames as PNG files, beside the video.",
    ),
)


output_options = group(OUTPUT)


def quality_of(output: Path, codec: str | None, crf: int | None, encoder: str) -> "Quality":
    """Raises UsageError for a codec, a CRF or an encoder that the kind of file of `output` cannot have."""
    from trt_wan.runtime.video.encoder import Quality
    from trt_wan.runtime.video.kinds import KINDS

    quality = Quality(codec, crf, encoder="nvenc" if encoder == "nvenc" else None)
    if output.suffix.lower() in KINDS:  # others are refused later
        quality.require_possible(output)
    return quality
