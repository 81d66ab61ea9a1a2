"""`--start` and `--end` of `run` and `preprocess`."""

from typing import TYPE_CHECKING

import click

from trt_wan.cli.options import group
from trt_wan.errors import UsageError

if TYPE_CHECKING:
    from trt_wan.runtime.video.cut import Cut, Mark


def _mark(ctx: click.Context, param: click.Parameter, value: str | None) -> "Mark | None":
    if value is None:
        return None
    from trt_wan.runtime.video.cut import Mark

    try:
        return Mark.of(value)
    except UsageError as error:
        raise click.BadParameter(f"{error.message} {error.hint}") from error


CUT = (
    click.option(
        "--start",
        callback=_mark,
        metavar="TIME|FRAME",
        help="Leave out the clip before it: a time (5.5, 83s, 1:23.5) or the number of a frame, from 0.",
    ),
    click.option(
        "--end",
        callback=_mark,
        metavar="TIME|FRAME",
        help="Leave out the clip from there on, with its sound.",
    ),
)


cut_options = group(CUT)


def cut_of(start: "Mark | None", end: "Mark | None") -> "Cut | None":
    if start is None and end is None:
        return None
    from trt_wan.runtime.video.cut import Cut

    return Cut(start, end)
