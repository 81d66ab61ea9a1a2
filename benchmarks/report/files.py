"""A result on disk: bench.json with everything, bench.csv with a line per figure, plots as PNG and SVG."""

import csv
from collections.abc import Iterator
from pathlib import Path

from trt_wan.benchmarks.report.result import OURS, Result

Row = tuple[str, str, str, float | int | str]  # kind, name, unit, value


def write_files(result: Result, folder: Path) -> list[Path]:
    """Every file that was written, plots only where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    document, rows = folder / "bench.json", folder / "bench.csv"
    document.write_text(result.to_json() + "\n")
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "name", "unit", "value"))
        writer.writerows(figures(result))
    return [document, rows, *_plots(result, folder)]


def figures(result: Result) -> Iterator[Row]:
    """The result as lines for a spreadsheet."""
    yield "job", "shape", "", result.shape.title
    yield "job", "hardware", "", result.card.hardware
    yield "job", "precision", "", result.precision
    yield "job", "tokens", "tokens", result.tokens
    yield "job", "FLOPs of a step", "FLOP", result.step_flops
    for ceiling in result.ceilings:
        if ceiling.rate is not None:
            unit = "B/s" if ceiling.name == "copy" else "FLOP/s"
            yield "ceiling", f"{ceiling.name} {ceiling.shape}", unit, ceiling.rate
    for name, spread in [(OURS, result.steps.seconds), *((p.title, p.seconds) for p in result.peers)]:
        if spread is not None:
            yield "step median", name, "s", spread.median
            yield "step p10", name, "s", spread.p10
            yield "step p90", name, "s", spread.p90
    for network in result.steps.networks:
        yield "network in a step", network.name, "s", network.seconds
        if network.bound_seconds is not None:
            yield "network's bound in a step", network.name, "s", network.bound_seconds
    if result.steps.bound_seconds is not None:
        yield "step bound", OURS, "s", result.steps.bound_seconds
    for start, job in (("warm", result.warm), ("cold", result.cold)):
        if job is not None:
            yield f"{start} start", "first step", "s", job.first_step_seconds
            yield f"{start} start", "whole job", "s", job.seconds
            for stage, seconds in job.stages.items():
                yield f"{start} stage", stage, "s", seconds


def _plots(result: Result, folder: Path) -> list[Path]:
    try:
        from trt_wan.benchmarks.report.plots import draw
    except ModuleNotFoundError:
        return []
    return draw(result, folder)
