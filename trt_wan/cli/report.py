"""Progress and the result of a command: for people, or as JSON lines for programs.

stdout carries the result (a path or a table; with --json one event per line and a last envelope), stderr
everything else.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import (
    CandidateReady,
    CandidateStep,
    EngineReady,
    EngineStep,
    Event,
    GraphExported,
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


class Report(Protocol):
    def progress(self, event: Event) -> None: ...

    def done(self, result: Result, data: dict[str, Any]) -> None: ...

    def failed(self, error: TrtWanError) -> None: ...


class JsonReport:
    def progress(self, event: Event) -> None:
        self._line({"event": type(event).__name__, **dataclasses.asdict(event)})

    def done(self, result: Result, data: dict[str, Any]) -> None:
        path = str(result) if isinstance(result, Path) else None
        self._line({"schema": SCHEMA, "ok": True, "data": {"result": path, **data}})

    def failed(self, error: TrtWanError) -> None:
        described: dict[str, Any] = {"code": error.code, "message": error.message, "hint": error.hint}
        if error.command:
            described["command"] = list(error.command)
        self._line({"schema": SCHEMA, "ok": False, "error": described})

    @staticmethod
    def _line(value: dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False)
        if not line.isprintable():  # bytes of a path that are no text: JSON has an escape for them
            line = json.dumps(value)
        print(line, flush=True)


class TextReport:
    """One line per stage, step and engine. On a terminal a line shows the current work and is overwritten."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._status: Any = None

    def progress(self, event: Event) -> None:
        if self.quiet or (isinstance(event, EngineReady) and event.state == "there"):
            return
        if isinstance(event, Note | GraphExported | EngineReady | CandidateReady):
            self._say(describe(event))
        elif sys.stderr.isatty():
            self._update(describe(event))
        elif not isinstance(event, EngineStep | CandidateStep):  # ten a second; its result follows
            self._say(describe(event))

    def done(self, result: Result, data: dict[str, Any]) -> None:
        self._stop()
        if result:
            print(result, flush=True)

    def failed(self, error: TrtWanError) -> None:
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
        return f"exported {event.name} in {event.seconds:.1f} s"
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
    where = f"window {event.window}/{event.windows}  " if event.window else ""
    if isinstance(event, StageStarted):
        return where + STAGES.get(event.stage, event.stage)
    if isinstance(event, StepDone):
        minutes, seconds = divmod(round(event.eta), 60)
        step = f"denoise {event.step}/{event.steps}  {event.seconds:.2f} s/step"
        return f"{where}{step}  ETA {minutes}:{seconds:02d}"
    assert isinstance(event, WindowDone)
    return f"{where}{event.frames} frames finished"


def report_for(as_json: bool, quiet: bool) -> Report:
    return JsonReport() if as_json else TextReport(quiet)


def readable_bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
