"""Signals: the first is never lost, and a helper of a build ends with it."""

import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slow_export import stay

from trt_wan.cli.command import _told
from trt_wan.cli.stopping import ignored, interrupts
from trt_wan.errors import Stopped


class Interrupted:
    """Its destructor runs while a signal comes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_a_destructor_still_stops(capfd: pytest.CaptureFixture[str]) -> None:
    """Python prints such an exception with a traceback, and goes on."""
    with pytest.raises(KeyboardInterrupt), interrupts():
        held = Interrupted()
        del held
        time.sleep(5)
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_changes_nothing_when_the_result_is_told() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ignored():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_helper_ends_with_its_build_in_the_middle_of_a_graph(tmp_path: Path) -> None:
    """One that went on would write into the folder while the next build goes on there."""
    started = tmp_path / "started"
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); from trt_wan.build import beside; beside.main()"
    errors = tmp_path / "errors"
    with errors.open("wb") as told:
        helper = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=told)
    assert helper.stdin is not None
    helper.stdin.write(pickle.dumps(stay) + f'["a graph", "{started}"]\n'.encode())
    helper.stdin.flush()
    end = time.monotonic() + 30
    while not started.exists():
        assert time.monotonic() < end and helper.poll() is None, errors.read_text()
        time.sleep(0.01)
    helper.stdin.close()
    assert helper.wait(5) == 0


def test_an_interrupt_that_python_wraps_is_one() -> None:
    """`__set_name__` of a class that is being imported, for one, raises a RuntimeError from it."""
    wrapped = RuntimeError("Error calling __set_name__")
    wrapped.__cause__ = KeyboardInterrupt()
    assert isinstance(_told(wrapped), Stopped)


ENDS = """
import sys
from trt_wan.cli import stopping
try:
    exec("raise KeyboardInterrupt")
except KeyboardInterrupt:
    {forget}
sys.exit(130)
"""


@pytest.mark.parametrize(("forget", "code"), [("stopping.forget()", 130), ("pass", -signal.SIGINT)])
def test_an_interrupt_in_code_of_exec_keeps_the_exit_code(tmp_path: Path, forget: str, code: int) -> None:
    """The second case is what Python does by itself."""
    (tmp_path / "ends.py").write_text(ENDS.format(forget=forget))
    assert subprocess.run([sys.executable, "-m", "ends"], cwd=tmp_path).returncode == code


HANGS = """
import sys, threading
from trt_wan.cli import stopping
threading.Thread(target=threading.Event().wait).start()
print("told")
stopping.end_with(130)
"""


def test_a_stopped_command_does_not_wait_for_threads() -> None:
    """A preparation had not ended 600 s after it had said that it was stopped."""
    ended = subprocess.run([sys.executable, "-c", HANGS], timeout=30, capture_output=True)
    assert (ended.returncode, ended.stdout) == (130, b"told\n")


def test_ctrl_c_in_a_terminal_leaves_a_worker_to_its_server() -> None:
    """The terminal sends the signal to both. The worker neither prints a traceback nor stops a job."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "trt_wan.worker.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None and worker.stdout is not None
    for name in ("before", "after"):
        worker.stdin.write(f'{{"id": "{name}", "arguments": ["show", "nothing", "--json"]}}\n')
        worker.stdin.flush()
        assert f'"id": "{name}"' in worker.stdout.readline()
        worker.send_signal(signal.SIGINT)
    _, err = worker.communicate(timeout=20)  # ends its stdin
    assert (worker.returncode, err) == (0, "")
