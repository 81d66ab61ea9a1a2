"""Arguments and results shared by the measurements that run as scripts (`python -m …`)."""

import argparse
import sys
from pathlib import Path
from typing import Any

from trt_wan.benchmarks.peers.shape import add_shape_arguments
from trt_wan.benchmarks.report.sheet import Report, as_line, console, tables, write
from trt_wan.runtime.events import Event, Note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a job")
    parser.add_argument("--executor", choices=("auto", "onnxruntime", "tensorrt"), default="auto")
    parser.add_argument("--tier", choices=("exact", "fast"), default="exact")
    parser.add_argument("--out", type=Path, help="folder for JSON and CSV")


def settings_from(options: argparse.Namespace) -> dict[str, Any]:
    return {"executor": options.executor, "tier": options.tier}


def say_note(event: Event) -> None:
    if isinstance(event, Note):
        print(event.text, file=sys.stderr, flush=True)


def finish(report: Report, out: Path | None) -> None:
    """Tables go to stderr, one line of JSON to stdout, files to `out`."""
    console().print(tables(report))
    if out:
        write(report, out, say_note)
    print(as_line(report.to_dict()))
