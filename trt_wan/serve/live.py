"""How far jobs are, in memory, and who wants to hear of it.

Threads that run jobs tell of changes; every listener gets the newest state of each job that changed since it
last looked, so that a slow one misses steps and never grows a queue.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from trt_wan.cli.report import STAGES
from trt_wan.serve.database import Kind

MOST_LISTENERS = 200


@dataclass(frozen=True)
class Progress:
    stage: str = ""
    window: int = 0
    windows: int = 0
    step: int = 0
    steps: int = 0
    seconds_per_step: float | None = None
    eta: float | None = None  # seconds
    frames_done: int = 0
    percent: int = 0

    def after(self, event: dict[str, Any], kind: Kind) -> "Progress":
        """The progress after an event (runtime/events.py) in JSON."""
        name = event["event"]
        if name == "StageStarted":
            made = replace(self, stage=STAGES.get(event["stage"], event["stage"]))
            if not event["windows"]:
                return made
            step = self.step if event["window"] == self.window else 0
            return replace(made, windows=event["windows"], window=event["window"], step=step)
        if name == "StageProgress":
            stage = STAGES.get(event["stage"], event["stage"])
            done = event["done"] / max(event["total"], 1)
            percent = round(50 * (done + (event["stage"] != "find person"))) if kind == "preparation" else 0
            return replace(
                self, stage=f"{stage}, frame {event['done']} of {event['total']}", percent=min(percent, 99)
            )
        if name == "StepDone":
            done = (event["window"] - 1 + event["step"] / event["steps"]) / event["windows"]
            same = {field: event[field] for field in ("window", "windows", "step", "steps", "eta")}
            return replace(self, **same, seconds_per_step=event["seconds"], percent=min(int(100 * done), 99))
        if name == "Note" and event["code"] == "resumed":
            return replace(self, frames_done=event["data"]["frames"])
        if name == "WindowDone":
            return replace(self, frames_done=self.frames_done + event["frames"])
        if name == "GraphExported":
            return replace(self, stage=f"exporting graph {event['number']} of {event['graphs']}")
        if name in ("EngineStep", "EngineReady"):
            return replace(self, stage=f"building engine {event['number']} of {event['engines']}")
        return self

    def as_fields(self) -> dict[str, Any]:
        fields = asdict(self)
        fields["progress"] = fields.pop("percent")
        return fields


class Live:
    """`tell` may be called from any thread; listening belongs to the server's event loop."""

    def __init__(self) -> None:
        self._progress: dict[str, Progress] = {}
        self._listeners: set[Listener] = set()
        self._lock = threading.Lock()

    def of(self, id: str) -> Progress | None:
        return self._progress.get(id)

    def set(self, id: str, progress: Progress | None) -> None:
        """None: the job has ended."""
        with self._lock:
            if progress is None:
                self._progress.pop(id, None)
            else:
                self._progress[id] = progress
        self.tell(id)

    def tell(self, id: str) -> None:
        """The job, or its place in the queue, has changed."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.tell(id)

    @contextmanager
    def listener(self) -> "Iterator[Listener | None]":
        """None where too many listen."""
        listener = Listener()
        with self._lock:
            full = len(self._listeners) >= MOST_LISTENERS
            if not full:
                self._listeners.add(listener)
        try:
            yield None if full else listener
        finally:
            with self._lock:
                self._listeners.discard(listener)


class Listener:
    def __init__(self) -> None:
        self._changed: dict[str, None] = {}  # ids, in order
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def tell(self, id: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._add, id)
        except RuntimeError:
            pass  # the server ends

    def _add(self, id: str) -> None:
        self._changed[id] = None
        self._event.set()

    async def changed(self, seconds: float) -> AsyncIterator[str]:
        """The ids of jobs that have changed; none after `seconds` without a change."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        self._event.clear()
        changed, self._changed = self._changed, {}
        for id in changed:
            yield id
