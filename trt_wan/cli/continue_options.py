"""`--start-frame` and `--extend` of `run`."""

from pathlib import Path

import click

from trt_wan.cli.options import group

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)

CONTINUE = (
    click.option(
        "--start-frame",
        type=FILE,
        help="A picture of the output's size before the clip's first frame; it is not in the output.",
    ),
    click.option(
        "--extend",
        type=FILE,
        help="A finished video: the new one goes on from its last frames, as many as --overlap.",
    ),
)


continue_options = group(CONTINUE)
