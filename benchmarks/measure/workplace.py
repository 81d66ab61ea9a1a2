"""Where and how a measured process runs: its environment, missing graphs, and a whole job from outside."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trt_wan.benchmarks.machine.host_use import host_use
from trt_wan.benchmarks.machine.monitor import Monitor
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.measured_process import Spec, most_steps
from trt_wan.benchmarks.measure.processes import Child
from trt_wan.benchmarks.measure.sample_clips import write_clips
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.times import JobTimes
from trt_wan.engines.store.home import home
from trt_wan.errors import GraphError, TrtWanError, shell_command
from trt_wan.runtime.events import Note, Progress

OURS_MODULE = "trt_wan.benchmarks.measure.measured_process"
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"  # often set in containers
SHARED = ("graphs", "engines", "measurements")  # folders of the user's home that measured processes use

NO_LIMIT = Budget()

T = TypeVar("T")
Rounds = list[list[float]]


@contextlib.contextmanager
def workplace(shape: Shape, shared: Sequence[str] = SHARED) -> Iterator[tuple[dict[str, str], str]]:
    """The environment of measured processes and a folder of clips.

    The folders `shared` are the user's. Kernels that TensorRT-RTX finishes on this machine are kept apart by
    default, so that a start can be cold. Bytecode is cached as Python does by default; where Python is told
    not to write it, it goes into a temporary folder: compiling our modules is no part of a start.

    The folder is removed in the end: lines that name it are taken out of an error's hint.
    """
    with tempfile.TemporaryDirectory(prefix="trt-wan-bench-") as temporary:
        folder = Path(temporary)
        for name in shared:
            real = home() / name
            real.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(real.resolve(), target_is_directory=True)
        clips = write_clips(folder / "clips", shape.width, shape.height, shape.window)
        env = os.environ | {"TRT_WAN_HOME": str(folder), "CUDA_CACHE_PATH": str(folder / "cuda")}
        if env.pop(NO_BYTECODE, ""):
            env["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
        try:
            yield env, str(clips)
        except TrtWanError as error:
            error.hint = "\n".join(line for line in error.hint.splitlines() if temporary not in line)
            raise


def forget_kernels(env: Mapping[str, str]) -> None:
    """Removes the kernels that TensorRT-RTX and the driver have finished in this workplace."""
    for folder in (Path(env["TRT_WAN_HOME"]) / "kernels", Path(env["CUDA_CACHE_PATH"])):
        shutil.rmtree(folder, ignore_errors=True)


def with_graphs(act: Callable[[], T], progress: Progress) -> T:
    """Returns the result of `act`. If graphs are missing, builds them with the error's command and tries
    again.
    """
    built: set[tuple[str, ...]] = set()
    while True:
        try:
            return act()
        except GraphError as error:
            command = error.command
            if not command or command in built:
                raise
        built.add(command)
        progress(Note(shell_command(command)))
        run = [sys.executable, "-m", "trt_wan", *command]
        ran = subprocess.run(run, capture_output=True, text=True)
        if ran.returncode:
            raise TrtWanError("The graphs could not be built.", ran.stderr.strip()[-300:])


def measure_job(
    spec: Spec, env: Mapping[str, str], budget: Budget = NO_LIMIT
) -> tuple[JobTimes, dict[str, Any]]:
    """A whole job in a new process: its times, and everything else it says."""
    before, arguments = host_use(), ["job", spec.to_json()]
    with Monitor.open() as monitor, Child(OURS_MODULE, arguments, env, budget.patience()) as child:
        answer = child.read()
    kept = JobTimes.__dataclass_fields__.keys() & answer.keys()
    times = JobTimes(
        **{name: answer[name] for name in kept},
        process_seconds=answer["at"] - child.started_at,
        first_step_seconds=answer["first_step_at"] - child.started_at,
        usage=monitor.usage(),
        host=host_use().since(before),
    )
    return times, answer


def measure_steps(
    spec: Spec, steps: int, env: Mapping[str, str], budget: Budget = NO_LIMIT
) -> tuple[list[float], dict[str, float], int | None]:
    """Seconds of each of `steps`, seconds of each network in a step, peak bytes on the GPU."""
    arguments = ["steps", spec.with_steps(most_steps(1, steps)).to_json()]
    with Monitor.open() as monitor, Child(OURS_MODULE, arguments, env, budget.patience()) as child:
        child.read()
        child.patience = budget.patience()
        answer = child.ask(str(steps))
        profile = child.ask("")
    networks = {row["name"]: float(row["seconds"]) for row in profile["networks"]}
    return answer["seconds"], networks, monitor.usage().peak_memory_bytes
