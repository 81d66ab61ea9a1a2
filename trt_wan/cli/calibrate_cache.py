"""`trt-wan bench calibrate-cache`: measures the ratios that `run --step-cache` needs."""

import tempfile
from pathlib import Path
from typing import Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.missing import require_graphs, tile_exporter
from trt_wan.cli.preset import with_preset
from trt_wan.cli.report import Report
from trt_wan.cli.run import FOLDER, RunOptions, run
from trt_wan.cli.sampling_options import refuse_unused_sampling
from trt_wan.cli.sizes import Size
from trt_wan.cli.sizes import size as size_option
from trt_wan.cli.step_ratios import SHARED
from trt_wan.engines.shape import Plan
from trt_wan.errors import UsageError

SIZE = 832, 480
USUAL = 0.06  # the threshold whose effect is told


@click.command("calibrate-cache", short_help="Measure the ratios of --step-cache.")
@click.option("--inputs", type=FOLDER, help="Folder of prepared clips. Default: the packaged sample.")
@click.option("--size", callback=size_option, metavar="WxH", help="Of the sample. Default: 832x480.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for --step-cache-ratios. Default: where `run` finds it.",
)
@command
def calibrate_cache(
    *, report: Report, inputs: Path | None, size: Size | None, out: Path | None, **given: Any
) -> Any:
    """Measure the ratios of --step-cache: one window with these options of `run`, every step computed.

    \b
    trt-wan bench calibrate-cache --weights models/ --steps 20

    Repeat it for other weights, LoRAs, samplers and noise levels, and with guidance if the job has it.
    """
    if inputs is not None and size is not None:
        raise UsageError("The clips of --inputs have a size.", "Leave out --size, or --inputs.")
    refuse_unused_sampling()
    options = RunOptions(**with_preset(report, given.pop("preset"), given))
    width, height = size or SIZE
    Plan(width, height, options.window or 77)  # refuses a bad size before clips are made
    with tempfile.TemporaryDirectory(prefix="trt-wan-calibrate-") as temporary:
        if inputs is None:
            from trt_wan.benchmarks.measure.sample_clips import write_prepared

            inputs = write_prepared(Path(temporary) / "clips", width, height, options.window or 77)
        return _calibrated(report, options, inputs, out)


def _calibrated(report: Report, options: RunOptions, inputs: Path, out: Path | None) -> Any:
    from trt_wan.benchmarks.measure.calibrate_cache import calibrate, require_calibration
    from trt_wan.runtime.opening.model import open_basis
    from trt_wan.runtime.step_cache import StepCache, skipped_steps, told_skips
    from trt_wan.runtime.video.clips import open_clips

    job = options.job(options.inputs(inputs))
    require_calibration(job)
    basis = open_basis(options.weight_files(), options.settings(), report.progress)
    basis.require_loras(job.loras)
    with open_clips(job.inputs, job.history) as clips:
        width, height = clips.width, clips.height
    require_graphs(report.progress, basis, width, height, job, options.build)()
    made = calibrate(basis, job, report.progress, tile_exporter(basis, options.build))
    path = made.write(out)
    cache, settings = StepCache(USUAL), job.step_settings
    skips = [
        skipped_steps(cache, ratios, side, settings, len(settings), 0)
        for side, ratios in enumerate(made.ratios.sides)
    ]
    note(report, f"With these ratios --step-cache {USUAL} skips {told_skips(skips)}.", "step_cache")
    return path, {"prompt": made.ratios.prompt, "negative": made.ratios.negative}


calibrate_cache.params += [parameter for parameter in run.params if parameter.name in SHARED]
