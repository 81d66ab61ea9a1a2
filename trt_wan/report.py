"""What the command line says while it works, and how it ends: for people, or as JSON lines for programs.

stdout carries the result (a path; with --json one event per line and a last envelope), stderr everything
else.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Protocol

from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import Event, Note, StageStarted, StepDone, WindowDone

SCHEMA = "trt-wan/1"

STAGES = {
    "weights": "opening the weights",
    "text": "encoding the prompt",
    "image": "encoding the reference",
    "condition": "encoding pose, face and background",
    "denoise": "denoising",
    "decode": "decoding",
}


class Report(Protocol):
    def progress(self, event: Event) -> None: ...

    def done(self, result: Path | None, data: dict[str, Any]) -> None: ...

    def failed(self, error: TrtWanError) -> None: ...


class JsonReport:
    def progress(self, event: Event) -> None:
        self._line({"event": type(event).__name__, **dataclasses.asdict(event)})

    def done(self, result: Path | None, data: dict[str, Any]) -> None:
        self._line(
            {"schema": SCHEMA, "ok": True, "data": {"result": str(result) if result else None, **data}}
        )

    def failed(self, error: TrtWanError) -> None:
        described = {"code": error.code, "message": error.message, "hint": error.hint}
        self._line({"schema": SCHEMA, "ok": False, "error": described})

    @staticmethod
    def _line(value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False), flush=True)


class TextReport:
    """One line per stage and step; on a terminal the lines of a window overwrite each other."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._status: Any = None

    def progress(self, event: Event) -> None:
        if self.quiet:
            return
        if isinstance(event, Note):
            self._say(event.text)
        elif sys.stderr.isatty():
            self._update(describe(event))
        else:
            self._say(describe(event))

    def done(self, result: Path | None, data: dict[str, Any]) -> None:
        self._stop()
        if result is not None:
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
