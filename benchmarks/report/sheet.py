"""Figures in rows. A `Sheet` is a table for people and lines of a CSV; a `Report` adds a document and plots.

kind,name,unit,value        steps median,trt-wan,s,1.86
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from trt_wan.engines.store.files import replace_atomically
from trt_wan.errors import with_commands
from trt_wan.install import install_command
from trt_wan.runtime.events import Note, Progress, silent

COLUMNS = 120  # the width of tables where stderr is no terminal


@dataclass(frozen=True)
class Shown:
    """How people see a figure: multiplied by `factor`, with that many digits. The CSV has it in `unit`."""

    unit: str
    factor: float
    digits: str
    after: str = ""


SHOWN = {
    "s": Shown("s", 1, ".3f"),
    "ms": Shown("s", 1e3, ".2f"),
    "GB": Shown("B", 1e-9, ".2f", " GB"),
    "GB/s": Shown("B/s", 1e-9, ".2f"),
    "TB/s": Shown("B/s", 1e-12, ".2f", " TB/s"),
    "TFLOP/s": Shown("FLOP/s", 1e-12, ".4g"),
    "TFLOP": Shown("FLOP", 1e-12, ".3g"),
    "GFLOP": Shown("FLOP", 1e-9, ".3g"),
    "PFLOP": Shown("FLOP", 1e-15, ".3g"),
    "frames/s": Shown("frames/s", 1, ".1f"),
    "J": Shown("J", 1, ".0f", " J"),
    "times": Shown("", 1, ".3f"),
    "%": Shown("", 100, ".1f", " %"),
    "error": Shown("", 1, ".2e"),
    "count": Shown("", 1, ".0f"),
    "": Shown("", 1, ".4g"),
}


@dataclass(frozen=True)
class Figure:
    """A value in its base unit; None is "not known". `note` follows it in tables."""

    value: float | None
    shown: str = ""  # a key of SHOWN
    note: str = ""

    @property
    def text(self) -> str:
        if self.value is None:
            return "not known"
        row = SHOWN[self.shown]
        return f"{self.value * row.factor:{row.digits}}{row.after}{self.note}"


Cell = str | Figure
Row = Sequence[Cell]  # its name first


@dataclass(frozen=True)
class Sheet:
    """`heads` name the columns after the first. A sheet without heads lists texts, left-aligned."""

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[Row]

    def table(self) -> Table:
        found = Table(
            title=self.title, title_justify="left", title_style="bold", show_header=bool(self.heads)
        )
        found.add_column("")
        for head in self.heads or ("",):
            found.add_column(head, justify="right" if self.heads else "left")
        for row in self.rows:
            found.add_row(*(cell.text if isinstance(cell, Figure) else cell for cell in row))
        return found

    def lines(self) -> Iterator[tuple[str, str, str, str | float]]:
        """Every cell with a value as kind, name, unit, value."""
        for name, *cells in self.rows:
            assert isinstance(name, str), f"{self.name}: a row begins with its name, not with {name}"
            for head, cell in zip(self.heads or ("",), cells, strict=True):
                kind = f"{self.name} {head}".strip()
                if isinstance(cell, Figure) and cell.value is not None:
                    unit = SHOWN[cell.shown].unit
                    yield _in_base_unit(kind, cell.shown, unit), name, unit, cell.value
                elif isinstance(cell, str) and cell:
                    yield kind, name, "", cell


def _in_base_unit(kind: str, shown: str, unit: str) -> str:
    """ "not hidden s" for "not hidden ms" where people see the figures in ms and the CSV has seconds."""
    return re.sub(rf"(?<!\S){re.escape(shown)}(?!\S)", unit, kind) if shown and unit else kind


class Report(Protocol):
    """A result that can be shown and written."""

    @property
    def stem(self) -> str:
        """The name of its files, without suffix."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Everything measured. Unknown figures are null in JSON."""
        ...

    def sheets(self) -> Sequence[Sheet | str]:
        """Tables and sentences, in reading order."""
        ...

    def draw(self) -> Mapping[str, Any]:
        """matplotlib figures by file stem. Raises ModuleNotFoundError without matplotlib."""
        ...


def as_line(document: Mapping[str, Any]) -> str:
    """One line of JSON. NaN and infinity are refused, so that any reader takes it."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False)


def tables(report: Report) -> Group:
    return Group(*(part.table() if isinstance(part, Sheet) else Text(part) for part in report.sheets()))


def console() -> Console:
    """Writes to stderr, as wide as the terminal, or wide enough for the tables."""
    terminal = Console(stderr=True)
    return terminal if terminal.is_terminal else Console(stderr=True, width=COLUMNS)


def write_document(report: Report, folder: Path) -> Path:
    """Writes the document alone and returns its path."""
    document = folder / f"{report.stem}.json"
    replace_atomically(document, as_line(report.to_dict()) + "\n")
    return document


def write_rows(report: Report, folder: Path) -> Path:
    """Writes the CSV alone and returns its path."""
    rows, text = folder / f"{report.stem}.csv", io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("kind", "name", "unit", "value"))
    for sheet in report.sheets():
        if isinstance(sheet, Sheet):
            writer.writerows(sheet.lines())
    replace_atomically(rows, text.getvalue())
    return rows


def write(report: Report, folder: Path, progress: Progress = silent) -> list[Path]:
    """Writes the document, the CSV and the plots (PNG and SVG), and returns their paths. Without matplotlib
    there are no plots, and a note says so.
    """
    written = [write_document(report, folder), write_rows(report, folder)]
    if not (plots := _drawn(report, progress)):
        return written
    from trt_wan.benchmarks.report.plots import save

    return [*written, *(path for name, plot in plots.items() for path in save(plot, folder / name))]


def _drawn(report: Report, progress: Progress) -> Mapping[str, Any]:
    try:
        return report.draw()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
    sentence = "Plots are left out: matplotlib is not installed (the extra bench). Run:"
    progress(Note(with_commands(sentence, install_command("bench")), "no_plots"))
    return {}
