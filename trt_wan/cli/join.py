"""`trt-wan join`: a video and those that were made with `run --extend`, as one."""

from pathlib import Path
from typing import Any

import click

from trt_wan.cli.command import command
from trt_wan.cli.report import Report

VIDEO = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command(short_help="Join finished videos.")
@click.argument("videos", type=VIDEO, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The video to write, of the same kind.",
)
@click.option("-y", "--overwrite", is_flag=True, help="Replace the output if it exists.")
@command
def join(*, report: Report, videos: tuple[Path, ...], output: Path, overwrite: bool) -> Any:
    """Write VIDEOS one after another as one video.

    \b
    trt-wan join out.mp4 more.mp4 -o whole.mp4

    Pictures are copied as they are, so all must have the same size, rate and --codec. Sound is encoded anew.
    """
    from trt_wan.runtime.video.join import join_videos

    frames, rate = join_videos(videos, output, overwrite)
    return output, {"frames": frames, "fps": float(rate)}
