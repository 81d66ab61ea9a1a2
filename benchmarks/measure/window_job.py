"""A job of several windows on one open model in a measured process, with a watch around its executor.

    python -m trt_wan.benchmarks.measure.window_job SPEC

SPEC is a `Spec` in JSON. Answers "window" after each window: its `text`, and the seconds of every stage so
far, by window. Networks are not in it: reading their times would wait for the GPU. In the end answers
"windows": the same, with the seconds of every network. Window 0 is the job outside its windows. The video is
written beside the clips.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.benchmarks.measure.timed import TimedExecutor, timed
from trt_wan.runtime.events import Event, Note, StageStarted, StepDone, WindowDone
from trt_wan.runtime.executors import Executor
from trt_wan.runtime.render import render


@dataclass
class WindowWatch:
    """Follows a job. A stage ends where the next one begins, a window with its last stage. `WindowDone` comes
    later: when its frames are on the disk.
    """

    notes: list[str] = field(default_factory=list)
    stages: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    steps: list[float] = field(default_factory=list)
    executor: TimedExecutor | None = None
    _now: tuple[int, str] = (0, "start")
    _since: float = field(default_factory=time.perf_counter)

    def observe(self, executor: Executor) -> Executor:
        self.executor = timed(executor)
        self.executor.watching = True
        return self.executor

    def progress(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        elif isinstance(event, StageStarted):
            self._enter(event.window, event.stage)
        elif isinstance(event, StepDone):
            self.steps.append(event.seconds)

    def found(self) -> dict[str, Any]:
        """The fields of an answer that are known while the job runs."""
        return {
            "choices": list(self.notes),
            "stages": [_row(window, stage, seconds) for (window, stage), seconds in self.stages.items()],
            "steps": list(self.steps),
        }

    def _enter(self, window: int, stage: str) -> None:
        """Nothing waits here: a window's stages end with a copy to the host."""
        now = time.perf_counter()
        self.stages[self._now] += now - self._since
        self._now, self._since = (window, stage), now
        if self.executor is not None:
            self.executor.stage = f"{window} {stage}"


def run_windows(spec: Spec) -> None:
    watch = WindowWatch()

    with spec.open(watch.progress, watch.observe) as model:

        def progress(event: Event) -> None:
            watch.progress(event)
            if isinstance(event, WindowDone):
                text = told(event.window, dict(watch.stages))
                say("window", window=event.window, text=text, **watch.found())

        made = render(spec.job(), model, Path(spec.clips) / "windows.mp4", overwrite=True, progress=progress)
        precision = model.precision
        assert watch.executor is not None
        networks = watch.executor.watched()
    say(
        "windows",
        precision=precision,
        **watch.found(),
        networks=[
            {**_row(*_parsed(stage), sum(seconds)), "name": name, "calls": len(seconds)}
            for (stage, name), seconds in networks.items()
        ],
        frames=made.frames,
        writing_seconds=made.writing_seconds,
    )


def told(number: int, stages: Mapping[tuple[int, str], float]) -> str:
    """The seconds of a window that is on the disk."""
    parts = [f"{stage} {seconds:.3f} s" for (window, stage), seconds in stages.items() if window == number]
    return f"window {number}: {', '.join(parts)}"


def _parsed(stage: str) -> tuple[int, str]:
    window, _, name = stage.partition(" ")
    return int(window or 0), name


def _row(window: int, stage: str, seconds: float) -> dict[str, Any]:
    return {"window": window, "stage": stage, "seconds": seconds}


def main() -> None:
    answering(lambda: run_windows(Spec.from_json(sys.argv[1])))


if __name__ == "__main__":
    main()
