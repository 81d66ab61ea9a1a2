"""One job on 1, 2, 4, … GPUs, one number after another: each is a process tree that opens the model once and
runs all sizes.

A size first runs a window with one step, which finishes kernels and tells how long a window will take. Then
it runs as many windows as fit in ROW_SECONDS, at most three, of which the last one counts. All numbers of
GPUs get the same inputs, so the finished latents of the first window are compared. Without a GPU the ranks
are processes on the CPU.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.benchmarks.machine.card import read_card, visible_gpus
from trt_wan.benchmarks.machine.monitor import Monitor
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import Child, is_lost
from trt_wan.benchmarks.measure.sample_clips import write_clips
from trt_wan.benchmarks.measure.scaling_job import Asked
from trt_wan.benchmarks.measure.similarity import relative_error
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import SHARED, with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.scaling import STAGES, TASKS, Scaling, ScalingRow, Span, Throughput, gpus_text
from trt_wan.errors import EnvironmentBroken, TrtWanError, UsageError
from trt_wan.runtime.device.gpu import device_count
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.parallel.trace import VARIABLE

MODULE = "trt_wan.benchmarks.measure.scaling_job"
MOST_WINDOWS = 3  # the third has another before and its writing beside it
ROW_SECONDS = 20.0
LEAST_PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Wanted:
    shapes: Sequence[Shape]
    gpus: Sequence[int]  # ascending
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 4
    weights: str | None = None
    budget: float | None = None  # seconds; later work is left out
    throughput: bool = True


def gpus_here(settings: Mapping[str, Any]) -> int | None:
    """None where jobs run on the CPU."""
    if settings.get("executor") == "onnxruntime" or read_card().gpu is None:
        return None
    try:
        return device_count()
    except EnvironmentBroken:
        return None


def announced(wanted: Wanted) -> list[dict[str, Any]]:
    """The rows that would be measured, in order. Nothing is started."""
    here = gpus_here(wanted.settings)
    sizes = [shape.title for shape in wanted.shapes]
    return [
        {"gpus": n, "processes": n, "sizes": sizes, "possible": here is None or n <= here}
        for n in wanted.gpus
    ]


def measure_scaling(
    wanted: Wanted, progress: Progress = silent, keep: Callable[[Scaling], object] = lambda unfinished: None
) -> Scaling:
    """`keep` gets the rows so far after every row. Raises TrtWanError if there is none in the end."""
    here = gpus_here(wanted.settings)
    if here is not None and wanted.gpus[0] > here:
        raise UsageError(
            f"--gpus begins with {wanted.gpus[0]}, and CUDA shows {gpus_text(here)} here.",
            f"Use --gpus 1 to {here}, or let CUDA_VISIBLE_DEVICES name more.",
        )
    with (
        tempfile.TemporaryDirectory() as folder,
        workplace(wanted.shapes[0], (*SHARED, "kernels")) as (env, _),
    ):
        bench = _Bench(wanted, Path(folder), env, min(wanted.gpus[-1], here or 0), progress, keep)
        for n in wanted.gpus:
            if here is not None and n > here:
                bench.leave_out(f"{n} GPUs and more: CUDA shows {gpus_text(here)} here")
                break
            bench.measure(n)
        if not bench.rows:
            nothing = UsageError(f"Nothing was measured: {bench.not_measured[0]}.", "Use a larger --budget.")
            raise next(iter(bench.failures), nothing)
        if wanted.throughput:
            bench.measure_throughput()
        return replace(bench.found(), finished=True)


class _Bench:
    def __init__(
        self,
        wanted: Wanted,
        folder: Path,
        env: Mapping[str, str],
        gpus: int,
        progress: Progress,
        keep: Callable[[Scaling], object],
    ) -> None:
        self.wanted, self.folder, self.progress, self.keep = wanted, folder, progress, keep
        self.card = read_card()
        self.budget = Budget(wanted.budget)
        self.trace = folder / "trace"
        self.trace.mkdir()
        self.env = {**env, VARIABLE: str(self.trace)}
        self.rows: list[ScalingRow] = []
        self.throughput: list[Throughput] = []
        self.not_measured: list[str] = []
        self.lost: list[str] = []
        self.failures: list[TrtWanError] = []
        self.done: set[tuple[int, Shape]] = set()
        self.now = wanted.shapes[0]  # the size that is being measured
        self.idle = [(gpu, _used(Monitor.open(gpu))) for gpu in visible_gpus(gpus)]
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._write_clips, dict.fromkeys(wanted.shapes)))

    def _write_clips(self, shape: Shape) -> None:
        frames = (MOST_WINDOWS + 1) * (shape.window - 1)
        write_clips(self.clips(shape), shape.width, shape.height, frames, ("pose", "face"))

    def clips(self, shape: Shape) -> Path:
        return self.folder / f"{shape.width}x{shape.height}"

    def found(self) -> Scaling:
        wanted = self.wanted
        return Scaling(
            self.card,
            wanted.weights or "random: figures are of speed, never of picture quality",
            wanted.settings,
            wanted.steps,
            list(self.rows),
            list(self.throughput),
            list(self.not_measured),
            finished=False,
            lost=list(self.lost),
        )

    def leave_out(self, text: str) -> None:
        self.not_measured.append(text)
        self.progress(Note(f"not measured: {text}"))

    def fail(self, what: str, error: TrtWanError) -> None:
        """Leaves a row out. A lost one makes the command fail in the end."""
        self.leave_out(f"{what}: {error.message}")
        if lost := is_lost(error, self.budget):
            self.lost.append(self.not_measured[-1])
        if lost or not self.budget.over:
            self.failures.append(error)

    def measure(self, n: int) -> None:
        """All sizes on `n` GPUs. A size that fails is left out, and the others get a new process."""
        if not self._may_open(gpus_text(n)):
            return
        while any((n, shape) not in self.done for shape in self.wanted.shapes):
            try:
                with_graphs(partial(self._measure_rest, n), self.progress)
            except TrtWanError as error:
                self.done.add((n, self.now))
                self.fail(f"{self.now.title}, {gpus_text(n)}", error)

    def _may_open(self, what: str) -> bool:
        """Whether there is time to open the model, as far as is known."""
        needed = min((row.start_seconds for row in self.rows), default=0.0)
        if short := self.budget.too_short(needed, "opening the model"):
            self.leave_out(f"{what}: {short}")
        return not short

    def _patience(self) -> float:
        """Seconds to wait for an answer. GPUs that wait for each other for ever must not take the budget."""
        return self.budget.patience(LEAST_PATIENCE)

    def _measure_rest(self, n: int) -> None:
        self.now = next(shape for shape in self.wanted.shapes if (n, shape) not in self.done)
        self.progress(Note(f"{gpus_text(n)}: opening the model"))
        with Child(MODULE, [self._spec(n, self.now).to_json()], self.env, self._patience()) as child:
            for shape in self.wanted.shapes:
                if (n, shape) in self.done:
                    continue
                self.now = shape
                with ExitStack() as stack:
                    monitors = [stack.enter_context(Monitor.open(*gpu)) for gpu in self.idle[:n]]
                    row = self._row(child, n, shape)
                self.done.add((n, shape))
                if row is not None:
                    memory = [monitor.usage().peak_memory_bytes for monitor in monitors]
                    self.rows.append(replace(row, memory_bytes=memory))
                    self.keep(self.found())

    def _row(self, child: Child, n: int, shape: Shape) -> ScalingRow | None:
        """None if there is no time for it."""
        first = self._ask(child, n, shape, MOST_WINDOWS, 1, steps=1)
        started = time.time() - child.started_at
        predicted = _window_seconds(_stages(first, 1), self.wanted.steps)
        if short := self.budget.too_short(predicted, "a window"):
            self.leave_out(f"{shape.title}, {gpus_text(n)}: {short}")
            return None
        count = max(1, min(MOST_WINDOWS, int(min(ROW_SECONDS, self.budget.left) / predicted)))
        for file in self.trace.iterdir():
            file.unlink()
        said = self._ask(child, n, shape, 0, count, self.wanted.steps)
        stages = _stages(said, count)
        seconds = sum(stages.values())
        step = Spread.of(said["steps"])
        self.progress(
            Note(f"{shape.title}, {gpus_text(n)}: {step.median:.3f} s a step, {seconds:.2f} s a window")
        )
        return ScalingRow(
            shape=shape,
            gpus=n,
            step_seconds=step,
            window_seconds=seconds,
            new_frames=shape.window - 1,
            stages=stages,
            window=count,
            windows=count,
            writing_seconds=said["writing_seconds"] / count,
            start_seconds=started,
            memory_bytes=[],
            error_first_step=self._error(n, shape, 1),
            error=self._error(n, shape, self.wanted.steps),
            precision=said["precision"],
            choices=said["choices"],
            spans=spans(self.trace, n, count, said["written"]),
        )

    def measure_throughput(self) -> None:
        """Jobs at the same time, each on one GPU, as many as the largest number of GPUs that was measured.
        For smaller numbers the first of these jobs count.
        """
        n = max(row.gpus for row in self.rows)
        if n == 1 or not self._may_open(f"{n} jobs at the same time"):
            return
        try:
            with_graphs(partial(self._measure_jobs, n), self.progress)
        except TrtWanError as error:
            self.fail(f"{n} jobs", error)

    def _measure_jobs(self, n: int) -> None:
        self.progress(Note(f"{n} jobs at the same time, each on one GPU"))
        with ExitStack() as stack, ThreadPoolExecutor(n) as threads:
            spec = self._spec(1, self.wanted.shapes[0]).to_json()
            jobs = []
            for number in range(n):
                env = {name: value for name, value in self.env.items() if name != VARIABLE}
                if self.idle:
                    env["CUDA_VISIBLE_DEVICES"] = self.idle[number][0]
                jobs.append((number, stack.enter_context(Child(MODULE, [spec], env, self._patience()))))

            def asked(shape: Shape, first: int, windows: int, steps: int) -> list[dict[str, Any]]:
                def ask(job: tuple[int, Child]) -> dict[str, Any]:
                    return self._ask(job[1], 1, shape, first, windows, steps, f"job{job[0]}-")

                return list(threads.map(ask, jobs))

            for shape in dict.fromkeys(row.shape for row in self.rows if row.gpus > 1):
                if any(made.shape == shape for made in self.throughput):
                    continue
                begun = asked(shape, MOST_WINDOWS, 1, steps=1)
                predicted = max(_window_seconds(_stages(said, 1), self.wanted.steps) for said in begun)
                if short := self.budget.too_short(predicted, "a window"):
                    self.leave_out(f"{shape.title}, {n} jobs: {short}")
                    continue
                count = max(1, min(MOST_WINDOWS, int(min(ROW_SECONDS, self.budget.left) / predicted)))
                said = asked(shape, 0, count, self.wanted.steps)
                steps = [Spread.of(each["steps"]).median for each in said]
                windows = [sum(_stages(each, count).values()) for each in said]
                together = [row for row in self.rows if row.shape == shape and row.gpus > 1]
                self.throughput += [Throughput.of(row, steps, windows) for row in together]
                self.keep(self.found())

    def _spec(self, n: int, shape: Shape, steps: int = 1) -> Spec:
        settings = {**self.wanted.settings, "gpus": n}
        return Spec(shape, str(self.clips(shape)), steps, settings, self.wanted.weights)

    def _ask(
        self, child: Child, n: int, shape: Shape, first: int, windows: int, steps: int, name: str = ""
    ) -> dict[str, Any]:
        latent = str(self._latent(n, shape, steps, name))
        return child.ask(Asked(self._spec(n, shape, steps), first, windows, latent).to_json())

    def _latent(self, n: int, shape: Shape, steps: int, name: str = "") -> Path:
        return self.folder / f"{name}{n}-{shape.width}x{shape.height}-{steps}.npy"

    def _error(self, n: int, shape: Shape, steps: int) -> float | None:
        """Against the fewest GPUs that were measured at this size; None for these themselves."""
        fewest = next((row.gpus for row in self.rows if row.shape == shape), n)
        if fewest == n:
            return None
        return relative_error(*(np.load(self._latent(k, shape, steps)) for k in (n, fewest)))


def _used(monitor: Monitor) -> int | None:
    return None if monitor.read is None else monitor.read().memory_bytes


def _stages(said: Mapping[str, Any], window: int) -> dict[str, float]:
    rows = {row["stage"]: row["seconds"] for row in said["stages"] if row["window"] == window}
    return {stage: rows[stage] for stage in STAGES}


def _window_seconds(first: Mapping[str, float], steps: int) -> float:
    """The seconds of a window with `steps` steps, estimated from those of a window with one step."""
    return sum(first.values()) + (steps - 1) * first["denoise"]


def spans(trace: Path, ranks: int, window: int, written: Sequence[Mapping[str, float]]) -> list[Span]:
    """Stages, tasks and steps of all ranks in a window of a traced job. `written`: as in scaling_job.py."""
    found = []
    begun = until = 0.0
    for rank in range(ranks):
        lines = list(map(json.loads, (trace / f"{rank}.jsonl").read_text().splitlines()))
        stages = {
            line["what"]: line["at"] for line in lines if line["window"] == window and not line["seconds"]
        }
        if rank == 0:  # others may not have written yet that they are done
            begun, until = stages["condition"], stages["done"]
        for line in lines:
            ended, what = line["at"], line["what"]
            if line["seconds"] and stages["condition"] < ended <= until:
                found.append(
                    Span(rank, TASKS.get(what, what), ended - line["seconds"] - begun, ended - begun)
                )
        if rank == 0:
            found.append(Span(0, "decode", stages["decode"] - begun, until - begun))
            ready = [row["at"] for row in written if row["window"] == window]
            found += [Span(0, "writing", stages["decode"] - begun, at - begun) for at in ready]
    return found
