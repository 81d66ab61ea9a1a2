"""`--gpus 2` on the CPU: real processes, from the command line, killed and stopped at every stage."""

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
from click.testing import CliRunner
from tiny_job import PLAN, TRT_WAN, prepare, read_frames, write_sound

from trt_wan.cli.main import cli
from trt_wan.errors import GpuFault, Stopped, WeightsError
from trt_wan.runtime.events import Event, StepDone, silent
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.networks.model import ALONE
from trt_wan.runtime.opening.cpu_sizes import CpuSizes
from trt_wan.runtime.opening.model import OpenModel, open_basis, open_model
from trt_wan.runtime.parallel.group import Group
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.tiny import write_tiny_weights

FRAMES = 37  # three windows of 13, which carry one
IN_TIME = 10.0  # seconds for a job to end after a rank is lost
Told = dict[str, Any]
When = Callable[[Told], bool]


@pytest.fixture(scope="module")
def place(home_of_ranks: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """weights/, clips/ without a face, and whole.mp4, made by one process."""
    base = tmp_path_factory.mktemp("gpus")
    prepare(base / "clips", write_sound(base / "tone.m4a", 1), FRAMES)
    (base / "clips/src_face.mp4").unlink()
    write_tiny_weights(base / "weights", seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(home_of_ranks(2)))
        # Bits depend on the number of threads, and ranks do not have that of conftest.threads.
        patch.setattr(onnxruntime, "InferenceSession", onnxruntime.InferenceSession.__base__)
        made = CliRunner().invoke(cli, arguments(base, base / "whole.mp4", "--gpus", "1"))
        assert made.exit_code == 0, made.stdout
        yield base


def children(process: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process).children(recursive=True)
        return [child for child in found if "trt_wan.runtime.parallel.child" in _arguments(child)]
    return []


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether the processes have ended in that time, and left no zombie."""
    _, alive = psutil.wait_procs(processes, seconds)
    return not alive


def shared_memory() -> set[Path]:
    """Ours; other processes have files there as well."""
    return set(Path("/dev/shm").glob("trt-wan-*"))


def arguments(place: Path, output: Path, *options: str) -> tuple[str, ...]:
    files = ("--inputs", str(place / "clips"), "--weights", str(place / "weights"), "-o", str(output))
    shape = ("--window", str(PLAN.frames), "--steps", "2", "--mode", "replace")
    return "run", *files, *shape, "--gpus", "2", "--no-text-cache", "--json", *options


class Run:
    """`trt-wan run` on two ranks."""

    def __init__(self, place: Path, output: Path, *options: str) -> None:
        self.output, self.told, self.shared = output, [], shared_memory()
        self.errors = output.with_suffix(".stderr")
        command = (*TRT_WAN, *arguments(place, output, *options))
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)

    def until(self, when: When) -> None:
        """Reads what the command tells, up to a line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told.append(json.loads(line))
            if when(self.told[-1]):
                return
        raise AssertionError(self.told[-3:])

    def rank(self) -> psutil.Process:
        """The other rank, as soon as it is there."""
        while not (found := children(self.process.pid)):
            assert self.process.poll() is None
            time.sleep(0.001)
        return found[0]

    def ended(self) -> Told:
        """The last line, when the command has ended as it should: nothing is left behind."""
        others = children(self.process.pid)
        with suppress(AssertionError):
            self.until(lambda told: False)
        self.process.wait()
        assert gone(others, 5)
        assert shared_memory() <= self.shared
        assert self.errors.read_text() == ""
        return dict(self.told[-1])

    @property
    def partial(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{self.output.stem}.partial*.mp4"))


def stage(name: str, window: int = 0) -> When:
    return lambda told: (
        (told.get("event"), told.get("stage"), told.get("window"))
        == (
            "StageStarted",
            name,
            window,
        )
    )


def step(number: int, window: int) -> When:
    return lambda told: (
        (told.get("event"), told.get("step"), told.get("window"))
        == (
            "StepDone",
            number,
            window,
        )
    )


def window(number: int) -> When:
    return lambda told: (told.get("event"), told.get("window")) == ("WindowDone", number)


@pytest.mark.long
def test_two_processes_make_the_frames_of_one(place: Path, tmp_path: Path) -> None:
    run = Run(place, tmp_path / "out.mp4")
    told = run.ended()
    assert told["ok"] and told["data"]["frames"] == FRAMES
    np.testing.assert_array_equal(read_frames(run.output), read_frames(place / "whole.mp4"))
    (split,) = (told["data"] for told in run.told if told.get("code") == "split")
    assert split == {"gpus": 2, "split": "tokens"}


MOMENTS: dict[str, tuple[When | None, int]] = {  # and the windows that are finished for certain
    "at its start": (None, 0),
    "opening": (stage("weights"), 0),
    "reference": (stage("image"), 0),
    "condition": (stage("condition", 1), 0),
    "denoising": (stage("denoise", 1), 0),
    "steps": (step(1, 1), 0),
    "decoding": (stage("decode", 1), 0),
    "between windows": (window(1), 1),
    "second condition": (stage("condition", 2), 0),
    "second window": (step(1, 3), 1),
    "last condition": (stage("condition", 3), 1),
}
IN_CI = {"second window"}


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.long) for name in MOMENTS]
)
def test_a_lost_rank_ends_the_job_and_finished_windows_stay(place: Path, tmp_path: Path, moment: str) -> None:
    when, finished = MOMENTS[moment]
    run = Run(place, tmp_path / "out.mp4")
    rank = run.rank()
    if when is not None:
        run.until(when)
    killed = time.monotonic()
    rank.kill()
    told = run.ended()
    assert time.monotonic() - killed < IN_TIME
    assert run.process.returncode == 1 and not told["ok"]
    assert told["error"]["code"] == "gpu_fault"
    message = "The process of GPU 1 was ended by SIGKILL, so the job cannot go on."
    assert told["error"]["message"] == message
    kept = run.partial
    done = len(read_frames(kept[0])) if kept else 0
    assert done >= PLAN.frames * finished
    if done:
        assert "finished frames are in" in told["error"]["hint"] and "--resume" in told["error"]["hint"]
        np.testing.assert_array_equal(read_frames(kept[0]), read_frames(place / "whole.mp4")[:done])
    # Any number of ranks goes on.
    rest = ("--resume", *(("--gpus", "1") if finished else ()))
    again = CliRunner().invoke(cli, arguments(place, run.output, *rest))
    assert again.exit_code == 0 and not children(os.getpid()), again.stdout
    np.testing.assert_array_equal(read_frames(run.output), read_frames(place / "whole.mp4"))
    assert not run.partial


@pytest.mark.long
def test_a_window_that_is_rendered_again_knows_the_frames_behind_it(place: Path, tmp_path: Path) -> None:
    made = []
    for gpus in ("1", "2"):
        output = tmp_path / f"{gpus}.mp4"
        run = Run(place, output, "--from", str(place / "whole.mp4"), "--redo", "2", "--gpus", gpus)
        assert run.ended()["ok"], run.told[-1]
        made.append(read_frames(output))
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != read_frames(place / "whole.mp4")).any()


@pytest.mark.long
@pytest.mark.parametrize("moment", [step(1, 2), stage("weights")])
def test_a_lost_first_rank_takes_the_others_with_it(place: Path, tmp_path: Path, moment: When) -> None:
    run = Run(place, tmp_path / "out.mp4")
    rank = run.rank()
    run.until(moment)
    run.process.kill()
    run.process.wait()
    assert gone([rank], 5)


@pytest.mark.long
def test_ctrl_c_ends_all_and_finished_windows_stay(place: Path, tmp_path: Path) -> None:
    run = Run(place, tmp_path / "out.mp4")
    rank = run.rank()
    run.until(step(1, 3))
    run.process.send_signal(signal.SIGINT)
    with suppress(AssertionError):
        run.until(lambda told: False)
    run.process.wait()
    assert run.process.returncode == 130 and run.told[-1]["error"]["code"] == "interrupted"
    assert gone([rank], 5)
    assert len(read_frames(run.partial[0])) >= PLAN.frames


# --- An open model -----------------------------------------------------------------------------------------


def job(place: Path, **changes: Any) -> Job:
    inputs = Inputs.from_folder(place / "clips", "animate")
    return Job(inputs, **{"window": PLAN.frames, "steps": 1, "seed": 7} | changes)


def opened(place: Path, gpus: int = 2) -> OpenModel:
    settings = Settings(executor="onnxruntime", text_cache=False, gpus=gpus)
    return open_model(WeightFiles((place / "weights",)), settings)


def frames(model: OpenModel, task: Job, **more: Any) -> Any:
    return np.concatenate(list(model.pieces(task, **more)), axis=1)


@pytest.mark.long
def test_a_model_goes_on_after_jobs_that_end_in_any_way(place: Path) -> None:
    """Stopped, left by its reader, with a rank that is lost while it waits and while it computes."""
    with opened(place, gpus=1) as alone:
        expected = frames(alone, job(place))
    with opened(place) as model:
        np.testing.assert_array_equal(frames(model, job(place)), expected)
        (first,) = children(os.getpid())
        np.testing.assert_array_equal(frames(model, job(place)), expected)
        assert children(os.getpid()) == [first], "it stays for the next job"
        first.kill()
        group: Any = model._group
        while group.lost is None:
            time.sleep(0.01)
        np.testing.assert_array_equal(frames(model, job(place)), expected)
        pieces = model.pieces(job(place))
        next(pieces)
        pieces.close()
        assert not children(os.getpid())
        with pytest.raises(Stopped):
            frames(model, job(place), should_stop=lambda: True)

        def kill(event: Event) -> None:
            if isinstance(event, StepDone):
                for child in children(os.getpid()):
                    child.kill()

        with pytest.raises(GpuFault, match="GPU 1 was ended by SIGKILL"):
            frames(model, job(place), progress=kill)
        np.testing.assert_array_equal(frames(model, job(place)), expected)
    assert not children(os.getpid())


@pytest.mark.long
def test_a_rank_that_hangs_is_lost_in_time(place: Path) -> None:
    files = WeightFiles((place / "weights",))
    settings = Settings(executor="onnxruntime", text_cache=False, gpus=2)
    basis = open_basis(files, settings, silent)
    sizes = CpuSizes(basis.weights.config, basis.weights.host, None, 2)
    start = partial(Group, files, settings, 3.0)
    with OpenModel(basis.weights, basis.precision, sizes, settings, ALONE, start) as model:
        stopped: list[float] = []

        def stop(event: Event) -> None:
            if isinstance(event, StepDone) and not stopped:
                stopped.append(time.monotonic())
                children(os.getpid())[0].send_signal(signal.SIGSTOP)

        with pytest.raises(GpuFault, match="GPU 1 has not answered for 3 s"):
            frames(model, job(place), progress=stop)
        assert time.monotonic() - stopped[0] < 3 + 2 * IN_TIME
    assert not children(os.getpid())


def test_an_error_of_a_rank_is_told_as_its_own(place: Path, tmp_path: Path) -> None:
    """Its weights are gone since this process has opened them."""
    weights = tmp_path / "weights"
    write_tiny_weights(weights, seed=5)
    settings = Settings(executor="onnxruntime", text_cache=False, gpus=2)
    basis = open_basis(WeightFiles((weights,)), settings, silent)
    for file in list(weights.iterdir()):
        file.rename(tmp_path / file.name)
    with basis.open() as model, pytest.raises(WeightsError, match="^GPU 1: ") as error:
        frames(model, job(place))
    assert error.value.hint and not children(os.getpid())


@pytest.mark.long
def test_no_file_descriptor_and_no_process_is_left(place: Path) -> None:
    """Of groups that come and go."""
    held = []
    for _ in range(3):
        with opened(place) as model:
            frames(model, replace(job(place), prompt="one"))
        held.append(len(os.listdir("/proc/self/fd")))
    assert held[2] <= held[0], held
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime > 0  # they have been waited for
