"""Where the time of each rank goes, for benchmarks: one line of JSON for every stage, task and step.

TRT_WAN_TRACE names a folder, which is made, and rank r appends to its file `r.jsonl`. `at` are seconds of a
clock that all processes of a machine share. A line with `seconds` is about work that ended then; one without
is a stage that begins, or "done" at the end of a window.
"""

import json
import os
import time
from pathlib import Path

from trt_wan.runtime.events import Event, Progress, StageStarted, StepDone, WindowDone
from trt_wan.runtime.parallel.ranks import Ranks

VARIABLE = "TRT_WAN_TRACE"


def now() -> float:
    """Seconds of the clock of all traces."""
    return time.monotonic()


def traced(progress: Progress, ranks: Ranks) -> Progress:
    """`progress`, which also writes the trace of a job. Without the variable it is returned as it is."""
    if not (folder := os.environ.get(VARIABLE)):
        return progress
    path = Path(folder) / f"{ranks.rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    def tell(what: str, seconds: float | None = None, window: int = 0) -> None:
        with path.open("a") as file:
            line = {"at": now(), "what": what, "seconds": seconds, "window": window}
            file.write(f"{json.dumps(line)}\n")

    def told(event: Event) -> None:
        if isinstance(event, StageStarted):
            tell(event.stage, window=event.window)
        elif isinstance(event, StepDone):
            tell("step", event.seconds, event.window)
        elif isinstance(event, WindowDone):
            tell("done", window=event.window)
        progress(event)

    ranks.watch = tell
    return told
