"""How every `trt-wan bench` ends: tables on stderr, files in `--out`, one JSON document on stdout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_wan.cli.command import note, show
from trt_wan.cli.report import Report
from trt_wan.errors import tell_with

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
        names = ", ".join(path.name for path in write(measured, out, report.progress))
        note(report, f"written: {names} in {out}")
    document = measured.to_dict()
    return as_line(document), document


@contextmanager
def keeping(out: Path | None) -> "Iterator[Callable[[Measured], None]]":
    """Gives a function that writes the document and the CSV of a measurement that goes on. Where the
    measurement ends early, the error names the document with the rows so far.
    """
    from trt_wan.benchmarks.report.sheet import write_document, write_rows

    written: list[Path] = []

    def keep(unfinished: "Measured") -> None:
        if out is not None:
            written[:] = [write_document(unfinished, out), write_rows(unfinished, out)]

    try:
        yield keep
    except BaseException as error:
        if written:
            tell_with(error, f"The rows measured so far are in {written[0]}.")
        raise
