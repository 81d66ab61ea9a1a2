"""How every `trt-wan bench` ends: tables on stderr, files in `--out`, one JSON document on stdout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_wan.cli.command import note, show
from trt_wan.cli.report import JsonReport, Report
from trt_wan.errors import GpuFault, some_of, tell_with

if TYPE_CHECKING:
    from trt_wan.benchmarks.report.sheet import Report as Measured


def show_tables(report: Report, measured: "Measured") -> None:
    from trt_wan.benchmarks.report.sheet import tables

    show(report, tables(measured))


def finished(
    report: Report,
    measured: "Measured",
    out: Path | None = None,
    lost: Sequence[str] = (),
    again: str = "Run it again",
) -> tuple[str, dict[str, Any]]:
    """Shows and writes the result. Returns it as a line of JSON and as a document. Raises GpuFault behind it
    for rows that were `lost`; `again` is the cure. An error of the disk comes behind it as well.
    """
    from trt_wan.benchmarks.report.sheet import as_line, write

    show_tables(report, measured)
    document = measured.to_dict()
    line = as_line(document)
    try:
        if out:
            names = ", ".join(path.name for path in write(measured, out, report.progress))
            note(report, f"written: {names} in {out}")
        if lost:
            memory = "Where SIGKILL ended a process, memory was short most likely: look at what is free."
            raise GpuFault(
                f"Not everything was measured: {some_of(lost, most=1).rstrip('.')}.",
                f"All other rows are measured and shown above. {again}.\n{memory}",
            )
    except (OSError, GpuFault):
        _hand_over(report, line, document)
        raise
    return line, document


def _hand_over(report: Report, line: str, document: dict[str, Any]) -> None:
    """The result of a command that fails in the end."""
    if isinstance(report, JsonReport):
        note(report, "the rows that were measured", "measured", **document)
    else:
        report.done(line, document)


def require_writable(out: Path | None) -> None:
    """Raises OutputError, as `trt-wan run` does, for a folder that no file can be written to. Leaves nothing
    there.
    """
    from trt_wan.runtime.video.target import claimed

    if out is not None:
        with claimed(out / "bench"):
            pass


@contextmanager
def keeping(out: Path | None, report: Report | None = None) -> "Iterator[Callable[[Measured], None]]":
    """Gives a function that writes the document and the CSV of a measurement that goes on. Where the
    measurement ends early, the error names the document with the rows so far. Raises OutputError at
    once for a folder that cannot be written to. A disk that is full later is noted in `report`, and the
    measurement goes on: `finished` tries again.
    """
    from trt_wan.benchmarks.report.sheet import write_document, write_rows

    require_writable(out)
    written: list[Path] = []

    def keep(unfinished: "Measured") -> None:
        if out is None:
            return
        try:
            written[:] = [write_document(unfinished, out), write_rows(unfinished, out)]
        except OSError as error:
            if report is None:
                raise
            text = f"{error.filename} cannot be written now ({error.strerror}). The measurement goes on."
            note(report, text, "not_kept")

    try:
        yield keep
    except BaseException as error:
        if written:
            tell_with(error, f"The rows measured so far are in {written[0]}.")
        raise
