"""How every `trt-wan bench` ends: tables on stderr, files in `--out`, one JSON document on stdout."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_wan.cli.command import note, show
from trt_wan.cli.report import Report

if TYPE_CHECKING:
    from trt_wan.benchmarks.report.sheet import Report as Measured


def show_tables(report: Report, measured: "Measured") -> None:
    from trt_wan.benchmarks.report.sheet import tables

    show(report, tables(measured))


def finished(report: Report, measured: "Measured", out: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Shows and writes the result. Returns it as a line of JSON and as a document."""
    from trt_wan.benchmarks.report.sheet import as_line, write

    show_tables(report, measured)
    if out:
        note(report, f"written: {', '.join(path.name for path in write(measured, out))} in {out}")
    document = measured.to_dict()
    return as_line(document), document


def keeper(out: Path | None) -> "Callable[[Measured], None]":
    """Writes the document of a measurement that goes on, so that a stopped one keeps its rows."""
    from trt_wan.benchmarks.report.sheet import write_document

    def keep(unfinished: "Measured") -> None:
        if out is not None:
            write_document(unfinished, out)

    return keep
