"""`trt-wan demo`: the whole pipeline on the sample, with the tiny model."""

from pathlib import Path
from typing import Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.report import Report
from trt_wan.cli.run import RunOptions, render_prepared

DEMO_SAMPLE = Path(__file__).parents[1] / "sample"
DEMO_OUTPUT = Path("demo.mp4")
DEMO_WINDOW = 13
DEMO_STEPS = 4


@click.command(short_help="Run everything once, small, with random weights.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=DEMO_OUTPUT, show_default=True
)
@command
def demo(*, report: Report, output: Path) -> Any:
    """Make tiny random weights and graphs in the cache and run the whole pipeline on the sample."""
    from trt_wan.runtime.video.target import check_target

    overwrite = output == DEMO_OUTPUT
    check_target(output, overwrite)
    options = RunOptions(weights=(demo_weights(report),), window=DEMO_WINDOW, steps=DEMO_STEPS)
    driving = DEMO_SAMPLE / "driving.mp4"
    return render_prepared(report, DEMO_SAMPLE, output, options, driving, overwrite)


def demo_weights(report: Report) -> Path:
    """The folder in the cache with random weights of the tiny model, which are made if they are not there."""
    from trt_wan.engines.store.home import home
    from trt_wan.runtime.weights.tiny import write_tiny_weights

    note(report, "The demo's weights are random, so its picture is noise; it shows that everything runs.")
    folder = home() / "weights" / "tiny"
    write_tiny_weights(folder, seed=0)
    return folder
