"""`trt-wan weights`: checkpoints to try the program with."""

from pathlib import Path
from typing import Any

import click

from trt_wan.cli.command import Group, command
from trt_wan.cli.report import Report


@click.group(cls=Group)
def weights() -> None:
    """Make or inspect checkpoints."""


@weights.command(short_help="Write a complete set of tiny random weights.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@command
def tiny(*, report: Report, folder: Path, seed: int) -> Any:
    """Write a complete set of tiny random weights to FOLDER, in the formats of the real files."""
    from trt_wan.runtime.weights.tiny import write_tiny_weights

    paths = write_tiny_weights(folder, seed)
    return folder, {
        "files": [str(path) for path in paths],
        "bytes": sum(path.stat().st_size for path in paths),
    }
