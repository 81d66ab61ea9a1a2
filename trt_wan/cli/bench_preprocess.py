"""`trt-wan bench preprocess`: how fast clips are prepared, by network, by part and as a whole."""

from pathlib import Path
from typing import Any

import click

from trt_wan.cli.bench_report import finished, keeping
from trt_wan.cli.command import command
from trt_wan.cli.report import Report
from trt_wan.cli.sizes import size as size_option
from trt_wan.errors import UsageError

NETWORK = click.Path(path_type=Path, exists=True)
SIZE, FRAMES = (832, 480), 77


@click.command("preprocess", short_help="Measure how fast clips are prepared.")
@click.option("--detector", type=NETWORK, required=True, help="yolov10m.onnx.")
@click.option("--pose", type=NETWORK, required=True, help="ViTPose wholebody, ONNX.")
@click.option("--sam2", type=NETWORK, help="SAM2 weights, for the mode replace.")
@click.option(
    "--clip", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Default: the sample."
)
@click.option(
    "--size",
    callback=size_option,
    default="x".join(map(str, SIZE)),
    show_default=True,
    metavar="WxH",
    help="Size of the video and of the sample's frames.",
)
@click.option(
    "--frames",
    type=click.IntRange(1, 100_000),
    help=f"Length of the sample, played back and forth. Default: {FRAMES}.",
)
@click.option("--executor", type=click.Choice(["auto", "onnxruntime", "tensorrt"]), default="auto")
@click.option("--mode", type=click.Choice(["animate", "replace", "both"]), default="both", show_default=True)
@click.option(
    "--repeat",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Timed runs of each, after a warm-up.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for JSON, CSV and plots (PNG and SVG).",
)
@command
def bench_preprocess(*, report: Report, frames: int | None, out: Path | None, **options: Any) -> Any:
    """Measure your networks in frames per second, and the preparation of a whole clip.

    \b
    trt-wan bench preprocess --detector yolov10m.onnx --pose vitpose-h/ --sam2 sam2.1_hiera_base_plus.pt
    """
    from trt_wan.benchmarks.preprocess.bench import Options, run_bench
    from trt_wan.engines.shape import Plan

    assert Plan(*options["size"]), "UsageError for a size that is not possible"
    if options["clip"] is not None and frames is not None:
        raise UsageError(
            "--frames is the length of the sample, and --clip names another clip.",
            "Give one of them; a clip is taken as it is.",
        )
    with keeping(out, report) as keep:
        measured = run_bench(Options(frames=frames or FRAMES, **options), report.progress, keep)
    return finished(report, measured, out)
