"""Progress and the result of a command: for people, or as JSON lines for programs.

stdout carries the result (a path or a table; with --json one event per line and a last envelope), stderr
everything else.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from trt_wan.errors import OutputError, TrtWanError
from trt_wan.runtime.events import (
    CandidateReady,
    CandidateStep,
    EngineReady,
    EngineStep,
    Event,
    FileProgress,
    FileReady,
    GraphExported,
    LiveWindow,
    Note,
    StageProgress,
    StageStarted,
    StepDone,
    WindowDone,
)

SCHEMA = "trt-wan/1"

STAGES = {
    "weights": "opening the weights",
    "text": "encoding the prompt",
    "image": "encoding the reference",
    "condition": "encoding pose, face and background",
    "denoise": "denoising",
    "decode": "decoding",
    "write": "writing the last frames",
    "find person": "finding the person",
    "write clips": "writing the clips",
}


Result = Path | str | None  # a str is a table for people; --json has its rows in the data


class StdoutLost(OutputError):
    """stdout is closed or full. stderr gets this error, also with --json."""


class Report(Protocol):
    def progress(self, event: Event) -> None: ...

    def done(self, result: Result, data: dict[str, Any]) -> None: ...

    def failed(self, error: TrtWanError) -> None: ...


class JsonReport:
    def progress(self, event: Event) -> None:
        self._line({"event": type(event).__name__, **dataclasses.asdict(event)})

    def done(self, result: Result, data: dict[str, Any]) -> None:
        path = str(result) if isinstance(result, Path) else None
        with _written(result):
            self._line({"schema": SCHEMA, "ok": True, "data": {"result": path, **data}})

    def failed(self, error: TrtWanError) -> None:
        described: dict[str, Any] = {"code": error.code, "message": error.message, "hint": error.hint}
        if error.command:
            described["command"] = list(error.command)
        self._line({"schema": SCHEMA, "ok": False, "error": described})

    def _line(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False)
        if not line.isprintable():  # bytes of a path that are no text: JSON has an escape for them
            line = json.dumps(value)
        self._print(line)

    def _print(self, line: str) -> None:
        _print(line)


class TextReport:
    """One line per stage, step and engine. On a terminal a line shows the current work and is overwritten."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._status: Any = None

    def progress(self, event: Event) -> None:
        with suppress(OSError):  # stderr is gone, with its terminal
            self._progress(event)

    def _progress(self, event: Event) -> None:
        if self.quiet or (isinstance(event, EngineReady) and event.state == "there"):
            return
        if isinstance(event, Note | GraphExported | EngineReady | CandidateReady | FileReady | LiveWindow):
            self._say(describe(event))
        elif sys.stderr.isatty():
            self._update(describe(event))
        elif not isinstance(event, EngineStep | CandidateStep | FileProgress):  # many; a result follows
            self._say(describe(event))

    def done(self, result: Result, data: dict[str, Any]) -> None:
        self._stop()
        if result:
            with _written(result):
                _print(str(result))

    def failed(self, error: TrtWanError) -> None:
        with suppress(OSError):
            self._stop()
            print(f"Error: {error.message}", file=sys.stderr)
            if error.hint:
                print(error.hint, file=sys.stderr)

    def _say(self, text: str) -> None:
        self._stop()
        print(text, file=sys.stderr, flush=True)

    def _update(self, text: str) -> None:
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True).status(text)
            self._status.start()
        self._status.update(text)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def describe(event: Event) -> str:
    """One line for people."""
    if isinstance(event, Note):
        return event.text
    if isinstance(event, GraphExported):
        return f"graph {event.number}/{event.graphs}  {event.name}  exported in {event.seconds:.1f} s"
    if isinstance(event, EngineStep | EngineReady):
        engine = f"{event.target}  engine {event.number}/{event.engines}  {event.name}"
        if isinstance(event, EngineStep):
            return f"{engine}  {event.phase} {event.step}/{event.steps}"
        if event.problem:
            return f"{engine}  {event.state}: {event.problem}"
        return f"{engine}  {event.state} in {event.seconds:.1f} s, {readable_bytes(event.bytes)}"
    if isinstance(event, CandidateStep | CandidateReady):
        candidate = f"{event.network}  candidate {event.number}/{event.candidates}  {event.candidate}"
        return f"{candidate}  {'measuring' if isinstance(event, CandidateStep) else event.text}"
    if isinstance(event, StageProgress):
        return f"{STAGES.get(event.stage, event.stage)}, frame {event.done} of {event.total}"
    if isinstance(event, FileProgress | FileReady):
        file = f"file {event.number}/{event.files}  {event.name}"
        if isinstance(event, FileReady):
            return f"{file}  {event.state}, {readable_bytes(event.bytes)}"
        done, total = event.done / 1e9, event.total / 1e9
        return f"{file}  {done:.2f} of {total:.2f} GB, {event.rate / 1e6:.0f} MB/s"
    if isinstance(event, LiveWindow):
        frames = f"in {event.frames_in}, out {event.frames_out}, dropped {event.dropped}"
        latency = f"latency {event.latency:.2f} s, at most {event.worst:.2f} s"
        return f"window {event.window}  {frames}  {latency}  {event.rate:.1f} frames/s"
    where = f"window {event.window}/{event.windows}  " if event.window else ""
    if isinstance(event, StageStarted):
        return where + STAGES.get(event.stage, event.stage)
    if isinstance(event, StepDone):
        minutes, seconds = divmod(round(event.eta), 60)
        step = f"denoise {event.step}/{event.steps}  {event.seconds:.2f} s/step"
        return f"{where}{step}  ETA {minutes}:{seconds:02d}"
    assert isinstance(event, WindowDone)
    return f"{where}{event.frames} frames finished"


def _print(text: str) -> None:
    """To stdout, at once. Raises StdoutLost, or BrokenPipeError where a reader has gone."""
    if sys.stdout is None:
        raise StdoutLost("Standard output is closed.", "Give the command a place to write its result to.")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # Python writes the rest there when it ends
        raise StdoutLost(
            f"Standard output cannot be written ({error.strerror}).", "Send it to another place."
        ) from error


@contextmanager
def _written(result: Result) -> Iterator[None]:
    """A command that has done its work says so, even if nothing reads stdout."""
    try:
        yield
    except (StdoutLost, BrokenPipeError) as error:
        if not isinstance(result, Path):
            raise
        why = error.message if isinstance(error, StdoutLost) else "Standard output has no reader."
        raise StdoutLost(f"{result} is written, but its path could not be printed.", why) from error


def report_for(as_json: bool, quiet: bool) -> Report:
    return JsonReport() if as_json else TextReport(quiet)


def readable_bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.1f} kB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
