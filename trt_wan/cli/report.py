"""What the command line says while it works, and how it ends: for people, or as JSON lines for programs.

stdout carries the result (a path or a table; with --json one event per line and a last envelope), stderr
everything else.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import Event, Note, StageProgress, StageStarted, StepDone, WindowDone

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


Result = Path | str | None  # a table is for people: with --json its rows are in the data


@dataclass(frozen=True)
class EngineStep:
    """An engine is being compiled; the phase and its steps are TensorRT's."""

    target: str
    name: str
    number: int  # of this engine, 1-based
    engines: int
    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class EngineReady:
    """An engine is in the store. Seconds are those of its compilation, whenever that was."""

    target: str
    name: str
    number: int
    engines: int
    state: str  # built, there, or impossible: then `problem` says why
    seconds: float
    bytes: int
    problem: str = ""


@dataclass(frozen=True)
class CandidateStep:
    """A candidate for a network's place is being measured."""

    network: str
    candidate: str
    number: int  # of this candidate, 1-based
    candidates: int


@dataclass(frozen=True)
class CandidateReady:
    """A candidate is measured; `text` says in words what came out."""

    network: str
    candidate: str
    number: int
    candidates: int
    state: str
    ms: float | None
    error: float | None
    tolerance: float
    text: str


Reported = Event | EngineStep | EngineReady | CandidateStep | CandidateReady


class Report(Protocol):
    def progress(self, event: Reported) -> None: ...

    def done(self, result: Result, data: dict[str, Any]) -> None: ...

    def failed(self, error: TrtWanError) -> None: ...


class JsonReport:
    def progress(self, event: Reported) -> None:
        self._line({"event": type(event).__name__, **dataclasses.asdict(event)})

    def done(self, result: Result, data: dict[str, Any]) -> None:
        path = str(result) if isinstance(result, Path) else None
        self._line({"schema": SCHEMA, "ok": True, "data": {"result": path, **data}})

    def failed(self, error: TrtWanError) -> None:
        described = {"code": error.code, "message": error.message, "hint": error.hint}
        self._line({"schema": SCHEMA, "ok": False, "error": described})

    @staticmethod
    def _line(value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False), flush=True)


class TextReport:
    """One line per stage and step, and per engine that is built; on a terminal what is under way is one line
    that is overwritten."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._status: Any = None

    def progress(self, event: Reported) -> None:
        if self.quiet or (isinstance(event, EngineReady) and event.state == "there"):
            return
        if isinstance(event, Note | EngineReady | CandidateReady):
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


def describe(event: Reported) -> str:
    """One line for people."""
    if isinstance(event, Note):
        return event.text
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
