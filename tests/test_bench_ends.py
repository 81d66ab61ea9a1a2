"""How `trt-wan bench` ends where the machine is in the way: a folder or disk that cannot be written to,
processes that are killed, and settings that are not for this machine.
"""

import json
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from kills import mounted_disk

from trt_wan.benchmarks.measure import quality, sweep, vae, window_budget, workplace
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import Child, NoAnswer, is_lost
from trt_wan.benchmarks.measure.sweep import Times
from trt_wan.cli.bench import _refuse_on_cpu
from trt_wan.cli.main import cli
from trt_wan.errors import GpuFault, MemoryShort, TrtWanError, UsageError
from trt_wan.runtime.events import silent
from trt_wan.runtime.opening.model import choose_precision, open_gpu
from trt_wan.runtime.settings import Settings

TINY = "--model tiny --size 64x48 --window 13 --executor onnxruntime"


def bench(arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *arguments.split()])


@pytest.mark.parametrize(
    "command", ["", "--repeat 2", "--gpus 1,2", "window", "sweep", "quality", "vae --weights ."]
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    refused = bench(f"{command} {TINY} --out {out}")
    assert refused.exit_code == 1 and refused.stdout == ""
    cure = "Check the disk, or write to another one."
    assert refused.stderr == f"Error: {out}/bench cannot be written (Not a directory).\n{cure}\n"


KILLED = """Error: The process that measured was ended by SIGKILL.
The likely reason is too little memory. Look at what is free and what the kernel says:
free -h
dmesg | tail
Then run it again."""


def killing(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str = "", signal: int = 9) -> str:
    """The name of a module that runs `code` and is then ended by a signal, as the OOM killer does."""
    (folder / "killed_job.py").write_text(f"import os, sys\n{code}\nos.kill(os.getpid(), {signal})\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))))
    return "killed_job"


def one_window() -> str:
    stages = [{"window": 1, "stage": "denoise", "seconds": 0.5}]
    found = {"window": 1, "text": "window 1", "stages": stages, "steps": [0.25], "choices": []}
    return f"print({json.dumps({'event': 'window', **found})!r}, flush=True)"


@pytest.mark.parametrize("command", ["", "window", "quality"])
def test_a_killed_process_is_told_without_a_traceback(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = killing(tmp_path, monkeypatch, one_window() if command == "window" else "")
    monkeypatch.setattr(window_budget, "MODULE", name)
    for module in (quality, workplace):
        monkeypatch.setattr(module, "OURS_MODULE", name)
    ended = bench(f"{command} {TINY} --out {tmp_path / 'out'}")
    assert isinstance(ended.exception, SystemExit) and ended.exit_code == 1, ended.output
    kept = f"\nThe rows measured so far are in {tmp_path}/out/window.json." if command == "window" else ""
    assert ended.stderr.endswith(f"{KILLED}{kept}\n"), ended.stderr


def test_another_signal_and_an_answer_that_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = killing(tmp_path, monkeypatch, "print('bad address', file=sys.stderr, flush=True)", signal=11)
    with Child(name, [], dict(os.environ)) as child, pytest.raises(GpuFault) as caught:
        child.read()
    assert caught.value.message == "The process that measured was ended by SIGSEGV."
    assert caught.value.hint == "Run it again. It said last: bad address"
    killing(tmp_path, monkeypatch, "import time; time.sleep(60)")
    with Child(name, [], dict(os.environ), 0.25) as child, pytest.raises(NoAnswer):
        child.read()


@pytest.mark.parametrize(
    ("error", "lost", "after_the_budget"),
    [
        (GpuFault("The process that measured was ended by SIGKILL."), True, True),
        (NoAnswer("No answer for 60 s."), True, False),
        (TrtWanError("scaling_job ended with 1"), True, False),
        (MemoryShort("12.0 GB are free."), False, False),
    ],
)
def test_rows_that_are_lost(error: TrtWanError, lost: bool, after_the_budget: bool) -> None:
    assert is_lost(error, Budget()) == lost
    assert is_lost(error, Budget(0)) == after_the_budget


@pytest.mark.parametrize(
    "command",
    [
        *("--tier fast", "--gpus 1,2 --tier turbo", "--gpus 1,2 --tier fast --dry-run", "window --tier fast"),
        *("quality --row fast --row turbo", "vae --weights . --row fast", "sweep --tier turbo"),
    ],
)
def test_settings_of_a_gpu_are_refused_at_once_as_by_run(command: str) -> None:
    refused = bench(f"{command} {TINY}")
    assert refused.exit_code == 2 and refused.stdout == "" and refused.stderr == told_by_run(tier="fast")


def test_a_precision_of_a_gpu_is_refused_at_once_as_by_run() -> None:
    refused = bench(f"window --precision bf16 {TINY}")
    assert refused.exit_code == 2 and refused.stderr == told_by_run(precision="bf16")


def told_by_run(**options: Any) -> str:
    """The error with which `run` opens a model."""
    settings = Settings(executor="onnxruntime", **options)
    with pytest.raises(UsageError) as caught:
        open_gpu(settings, silent)
        choose_precision(settings, None)
    return f"Error: {caught.value.message}\n{caught.value.hint}\n"


def test_a_row_for_the_cpu_is_measured_beside_one_that_is_not() -> None:
    _refuse_on_cpu({"executor": "onnxruntime", "tier": "fast"}, {"executor": "onnxruntime"})


def test_a_server_whose_jobs_would_all_be_refused_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trt_wan.serve.main.listen", lambda *settings: "started")
    model = "--random-weights tiny --executor onnxruntime --tier turbo"
    refused = CliRunner().invoke(cli, f"serve --data {tmp_path} {model}".split())
    assert refused.exit_code == 2 and refused.stderr == told_by_run(tier="fast")


SWEEP = f"sweep --axes window --windows 5,9,13 --steps 2 {TINY}"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GpuFault("The process that measured was ended by SIGKILL."), 1),
        (MemoryShort("12.0 GB are free."), 0),
    ],
)
def test_a_lost_point_of_a_sweep_is_a_failure_behind_the_others(
    error: TrtWanError, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_steps(spec: Spec, steps: int, *rest: Any) -> Times:
        if spec.shape.window == 9:
            raise error
        return [0.5] * steps, {}, None

    monkeypatch.setattr(sweep, "measure_steps", measure_steps)
    ran = bench(f"{SWEEP} --out {tmp_path}")
    assert ran.exit_code == code, ran.output
    points = json.loads(ran.stdout.splitlines()[-1])["points"]
    assert [(point["reason"], point["lost"]) for point in points] == [
        *(("", False), (error.message, bool(code)), ("", False))
    ]
    assert json.loads((tmp_path / "sweep.json").read_text())["points"] == points
    told = f"Error: Not everything was measured: window 9 frames: {error.message}\n"
    assert (told in ran.stderr) == bool(code)


@pytest.mark.parametrize(
    ("error", "budget", "code", "told"),
    [
        (GpuFault("The process was lost."), "", 1, "Error: The process was lost.\n"),
        (
            NoAnswer("No answer for 1 s."),
            "--budget 1",
            2,
            "Error: Nothing was measured: the budget of 1 s was",
        ),
    ],
)
def test_a_sweep_that_measured_nothing(
    error: TrtWanError, budget: str, code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_steps(*given: Any) -> Times:
        if budget:
            time.sleep(1.1)
        raise error

    monkeypatch.setattr(sweep, "measure_steps", measure_steps)
    ran = bench(f"{SWEEP} {budget} --out {tmp_path / 'out'}")
    assert ran.exit_code == code and told in ran.stderr and ran.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_lost_row_of_quality_is_a_failure_behind_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing(quality._Recorder):
        def record(self, name: str, *rest: Any, **options: Any) -> dict[str, Any]:
            if name == LOST_ROW:
                raise LOST
            return {"candidates": {}}

        def _errors(self, name: str, against: str) -> list[float]:
            return [0.25]

    monkeypatch.setattr(quality, "_Recorder", Losing)
    ran = bench(f"quality --no-frames --row exact --row {LOST_ROW} {TINY} --out {tmp_path}")
    assert_lost(ran, ["exact", "floor: unfused kernels"])


def test_a_lost_row_of_the_vae_is_a_failure_behind_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing:
        """A process that answers, unless it is the second one."""

        def __init__(self, module: str, arguments: list[str], env: Any, patience: float) -> None:
            self.lost = arguments[2].endswith("1.npz")

        def __enter__(self) -> "Losing":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self) -> dict[str, Any]:
            if self.lost:
                raise LOST
            return {"decode": {"seconds": [0.5]}, "encode": {"seconds": [0.5]}, "files": {"vae": "vae"}}

    monkeypatch.setattr(vae, "Child", Losing)
    monkeypatch.setattr(vae, "rows_of", lambda *given: iter(()))
    ran = bench(f"vae --weights {tmp_path} --row exact --row {LOST_ROW} {TINY} --out {tmp_path}")
    assert_lost(ran, ["exact"])


LOST = GpuFault("The process that measured was ended by SIGKILL.")
LOST_ROW = "exact;precision=fp32"


def assert_lost(ran: Result, rows: list[str]) -> None:
    assert ran.exit_code == 1, ran.output
    document = json.loads(ran.stdout.splitlines()[-1])
    assert [row["name"] for row in document["rows"]] == rows
    assert document["lost"] == [f"{LOST_ROW}: {LOST.message}"]
    assert f"Error: Not everything was measured: {LOST_ROW}: {LOST.message}\n" in ran.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_disk_is_told_behind_the_rows(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    measured: list[int] = []

    def measure_steps(spec: Spec, steps: int, *rest: Any) -> Times:
        measured.append(spec.shape.window)
        return [0.5] * steps, {}, None

    monkeypatch.setattr(sweep, "measure_steps", measure_steps)
    (folder := tmp_path / "disk").mkdir()
    with ExitStack() as stack:
        try:
            out = stack.enter_context(mounted_disk(folder, 4096))
        except PermissionError:
            pytest.skip("this machine mounts nothing")
        (out / "sweep.csv").write_text("what was there" * 200)
        ran = bench(f"{SWEEP} --out {out}{' --json' if as_json else ''}")
        assert {path.name for path in out.iterdir()} == {"sweep.csv"}
        assert (out / "sweep.csv").read_text() == "what was there" * 200
    assert ran.exit_code == 1 and measured == [5, 9, 13]
    told = f"{out}/sweep.json: the disk is full."
    if as_json:
        *events, last = map(json.loads, ran.stdout.splitlines())
        assert last["error"]["message"] == told and last["error"]["code"] == "output_unwritable"
        assert sum(event.get("code") == "not_kept" for event in events) == 3
        (found,) = [event["data"] for event in events if event.get("code") == "measured"]
    else:
        found = json.loads(ran.stdout.splitlines()[-1])
        assert ran.stderr.endswith(f"Error: {told}\nFree some space.\n"), ran.stderr
        assert f"{out}/sweep.json cannot be written now" in " ".join(ran.stderr.split())
    assert [point["seconds"]["median"] for point in found["points"]] == [0.5] * 3
