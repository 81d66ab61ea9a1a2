"""The measured process of trt-wan: a job through the real pipeline, with a watch around its executor.

    python -m trt_wan.benchmarks.measure.measured_process MODE SPEC

SPEC is a `Spec` in JSON. Every line on stdout is a JSON object with an "event". The modes:

    job     a whole job to a video file: the start, every stage, every network
    steps   after its warm-up reads lines from stdin: numbers of steps to time, then an empty line

It imports no torch. Times of day (`at`) are compared with the time at which the process was started.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.benchmarks.measure.timed import TimedExecutor, timed
from trt_wan.benchmarks.peers.child import WARM_UP
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.errors import Stopped
from trt_wan.runtime.events import Event, Note, Progress, StageStarted, StepDone
from trt_wan.runtime.executors import Executor, Observe
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.host_memory import peak_bytes
from trt_wan.runtime.job import Inputs, Job, Mode
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.prompts import DEFAULT_PROMPT
from trt_wan.runtime.render import render
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.find_files import PartsMissing

PROFILED = 5  # steps timed network by network, after those that are timed as a whole
PAUSE = 0.5  # seconds after which a GPU may have cooled down or run other work


@dataclass(frozen=True)
class Spec:
    """A job and its model. Without `weights` they are generated."""

    shape: Shape
    clips: str  # folder of prepared clips
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)  # fields of runtime.settings.Settings
    weights: str | None = None
    seed: int = 0
    mode: Mode = "animate"
    prompt: str = DEFAULT_PROMPT
    stop_after: int | None = None  # steps

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Spec":
        values = json.loads(text)
        return Spec(**{**values, "shape": Shape(**values["shape"])})

    def with_steps(self, steps: int) -> "Spec":
        return replace(self, steps=steps)

    def job(self) -> Job:
        return Job(
            Inputs.from_folder(Path(self.clips), self.mode),
            mode=self.mode,
            prompt=self.prompt,
            window=self.shape.window,
            steps=self.steps,
            seed=self.seed,
        )

    def open(self, progress: Progress, observe: Observe | None) -> OpenModel:
        """The model, as `trt-wan run` opens it. A hint names no options that benchmarks lack."""
        files = WeightFiles(folders=(Path(self.weights),)) if self.weights else None
        weights = files or WeightFiles(random=self.shape.model)
        settings = Settings(**{"keep_encoders": False} | self.settings)
        try:
            return open_model(weights, settings, progress, observe)
        except PartsMissing as error:
            error.hint = "Put it there: benchmarks take all parts from one folder."
            raise


@dataclass
class Opened:
    """Collects, from the notes of a model, the candidate of every network that has several, and the file of
    every part.
    """

    candidates: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note) and event.code == "candidate":
            self.candidates[str(event.data["network"])] = str(event.data["candidate"])
        if isinstance(event, Note) and event.code == "weights_file":
            self.files[str(event.data["part"])] = str(event.data["file"])


class Watch:
    """Stages, notes and the executor of a job under way."""

    def __init__(self, on_step: Callable[["Watch", StepDone], None], watching: bool) -> None:
        self.on_step, self.watching = on_step, watching
        self.executor: TimedExecutor | None = None
        self.precision = ""
        self.notes: list[str] = []
        self.stages: dict[str, float] = defaultdict(float)
        self.stages_cpu: dict[str, float] = defaultdict(float)  # CPU seconds of all threads
        self.first_step_at: float | None = None
        self._stage, self._since, self._cpu_since = "open clips", time.perf_counter(), time.process_time()

    def observe(self, executor: Executor) -> Executor:
        self.executor = timed(executor)
        self.executor.watching = self.watching
        return self.executor

    def progress(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.enter(event.stage)
        elif isinstance(event, Note):
            self.notes.append(event.text)
        elif isinstance(event, StepDone):
            if self.first_step_at is None:
                self.first_step_at = time.time()
            self.on_step(self, event)

    def enter(self, stage: str) -> None:
        """Work counts for the stage that enqueued it."""
        if self.executor is not None:
            self.executor.wait()
            self.executor.stage = stage
        now, cpu = time.perf_counter(), time.process_time()
        self.stages[self._stage] += now - self._since
        self.stages_cpu[self._stage] += cpu - self._cpu_since
        self._stage, self._since, self._cpu_since = stage, now, cpu

    def opened(self) -> dict[str, Any]:
        assert self.executor is not None
        return {
            "precision": self.precision,
            "executor": type(self.executor.executor).__name__,
            "choices": self.notes,
        }


def run_job(spec: Spec) -> None:
    """Reads clips, denoises `steps` steps and writes a video beside the clips."""
    step_seconds: list[float] = []

    def on_step(watch: Watch, event: StepDone) -> None:
        step_seconds.append(event.seconds)

    start = time.perf_counter()
    watch = Watch(on_step, watching=True)
    job, output = spec.job(), Path(spec.clips) / "bench.mp4"
    watch.enter("weights")
    with spec.open(watch.progress, watch.observe) as model:
        watch.precision = model.precision
        made = render(job, model, output, overwrite=True, progress=watch.progress)
    watch.enter("done")
    assert watch.executor is not None
    say(
        "job",
        seconds=time.perf_counter() - start,
        frames=made.frames,
        writing_seconds=made.writing_seconds,
        steps=step_seconds,
        stages=watch.stages,
        stages_cpu=watch.stages_cpu,
        cpu_seconds=time.process_time(),
        networks=[
            {"stage": stage, "name": name, "calls": len(seconds), "seconds": float(np.sum(seconds))}
            for (stage, name), seconds in watch.executor.watched().items()
        ],
        calls=dict(watch.executor.calls),
        host_peak_bytes=peak_bytes(),
        first_step_at=watch.first_step_at,
        **loading(watch.executor.executor),
        at=time.time(),
        **watch.opened(),
    )


def run_steps(spec: Spec) -> None:
    """`spec.steps` is the limit for all steps, warm-ups and profiled steps included."""
    script: Generator[None, StepDone, None] | None = None

    def on_step(watch: Watch, event: StepDone) -> None:
        nonlocal script
        if script is None:
            script = rounds(watch)
            next(script)
        script.send(event)

    watch = Watch(on_step, watching=False)
    with spec.open(watch.progress, watch.observe) as model, suppress(Stopped):
        watch.precision = model.precision
        for _ in model.pieces(spec.job(), progress=watch.progress):
            raise AssertionError(f"{spec.steps} steps were too few")


def rounds(watch: Watch) -> Generator[None, StepDone, None]:
    """Advances after each step: at every `yield` the pipeline computes the next step."""
    yield from warm_up()
    say("ready", **watch.opened())
    while line := (yield from asked()):
        timed_steps = []
        for _ in range(int(line)):
            timed_steps.append((yield))
        say(
            "round",
            seconds=[step.seconds for step in timed_steps],
            host_seconds=[step.host_seconds for step in timed_steps],
        )
    assert watch.executor is not None
    watch.executor.start_watching()
    profiled = []
    for _ in range(PROFILED):
        profiled.append((yield))
    say_profile(watch.executor, float(np.median([step.seconds for step in profiled])))
    raise Stopped("All rounds are done.")


def asked() -> Generator[None, StepDone, str]:
    """Returns the next line of stdin, stripped. After a long wait the GPU is warmed up again."""
    since = time.perf_counter()
    line = sys.stdin.readline().strip()
    if time.perf_counter() - since > PAUSE:
        yield from warm_up()
    return line


def warm_up() -> Generator[None, StepDone, None]:
    """Call before timing: the GPU may have idled or run other work."""
    for _ in range(WARM_UP):
        yield


def most_steps(rounds: int, steps: int) -> int:
    """Returns the most steps that the mode "steps" computes for `rounds` of `steps`."""
    return WARM_UP + rounds * (WARM_UP + steps) + WARM_UP + PROFILED


def say_profile(executor: TimedExecutor, step_seconds: float) -> None:
    """Answers with the networks' times in a step (medians of PROFILED), and a step's calls and uploads."""
    networks = []
    for (_, name), seconds in executor.watched().items():
        by_step = np.array_split(seconds, PROFILED)
        networks.append(
            {
                "name": name,
                "calls": len(seconds) // PROFILED,
                "seconds": float(np.median([part.sum() for part in by_step])),
                "fastest": float(np.min(seconds)),
            }
        )
    say(
        "profile",
        seconds=step_seconds,
        networks=networks,
        calls={name: count / PROFILED for name, count in executor.calls.items()},
        uploads={name: count / PROFILED for name, count in executor.uploads.items() if count},
        host_peak_bytes=peak_bytes(),
    )


def loading(executor: Executor) -> dict[str, Any]:
    """Figures of loading weights onto a GPU, null on the CPU."""
    names = ("loaded_bytes", "loading_seconds", "pinned_bytes")
    if not isinstance(executor, GpuExecutor):
        return dict.fromkeys(names)
    weights = executor.weights
    return dict(
        zip(names, (weights.loaded_bytes, weights.loading_seconds, weights.pinned_bytes), strict=True)
    )


MODES = {"job": run_job, "steps": run_steps}


def main() -> None:
    mode, spec = sys.argv[1:]
    answering(lambda: MODES[mode](Spec.from_json(spec)))


if __name__ == "__main__":
    main()
