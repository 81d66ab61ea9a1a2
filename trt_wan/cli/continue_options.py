"""`--start-frame` and `--extend` of `run`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)

CONTINUE = (
    click.option(
        "--start-frame",
        type=FILE,
        help="A picture of the output's size: the video goes on from it, with the clip's first frame.",
    ),
    click.option(
        "--extend",
        type=FILE,
        help="A finished video: the new one goes on from its last frames, as many as --overlap.",
    ),
)


def continue_options(function: Function) -> Function:
    for option in reversed(CONTINUE):
        function = option(function)
    return function
