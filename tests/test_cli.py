"""The command as a user runs it: what it makes, what it says and where, how it ends and how it fails.

In a process of its own where the process matters (exit code, signals, what is imported), else in this one.
"""

import errno
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result
from lengths import measured
from safetensors.numpy import save_file
from test_hints import not_alone
from tiny_job import (
    BUILD,
    FRAMES,
    PLAN,
    RATE,
    TRT_WAN,
    as_argv,
    prepare,
    read_frames,
    write_clip,
    write_reference,
    write_sound,
)

import trt_wan.runtime.render
from trt_wan.cli.main import cli
from trt_wan.engines.checkpoint import PARTS
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.files import named
from trt_wan.engines.store.graphs import graph_set, graphs_folder
from trt_wan.errors import MemoryShort, UsageError
from trt_wan.install import install_command
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import require_memory
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.weights.tensor_file import TensorFile
from trt_wan.runtime.weights.tiny import write_tiny_weights

ROOT = Path(__file__).parents[1]
FIRST_WINDOW = PLAN.frames
HEAVY = {"torch", "tensorrt", "tensorrt_rtx", "onnx", "onnxscript", "diffusers", "transformers"}
SLOW_TO_IMPORT = HEAVY | {"numpy", "av", "cv2", "onnxruntime", "safetensors", "tokenizers", "rich", "psutil"}

# `trt-wan …` that writes down what it imported: python -c LISTING FILE …
LISTING = """
import atexit, pathlib, sys
file = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: file.write_text(" ".join(sys.modules)))
from trt_wan.__main__ import main
main()
"""

# `trt-wan …` on a machine where packages are missing: python -c LACKING torch,onnx …
LACKING = """
import sys
names = sys.argv.pop(1).split(",")

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from trt_wan.__main__ import main
main()
"""

# `trt-wan …` whose denoising steps never end after the first two, which are window 1: python -c STUCK …
STUCK = """
import time
from trt_wan.runtime import denoise

velocity, calls = denoise.velocity, []

def stuck(*arguments, **more):
    calls.append(1)
    if len(calls) > 2:
        time.sleep(120)
    return velocity(*arguments, **more)

denoise.velocity = stuck
from trt_wan.__main__ import main
main()
"""


@dataclass(frozen=True)
class Workplace:
    clips: Path  # all five prepared files
    pose_only: Path  # reference and pose: a third of the time, faces are 512x512
    weights: Path


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    write_tiny_weights(folder / "weights", seed=5)
    clips = prepare(folder / "clips", write_sound(folder / "tone.m4a", 1))
    (folder / "pose_only").mkdir()
    for name in ("src_ref.png", "src_pose.mp4"):
        shutil.copy(clips / name, folder / "pose_only" / name)
    return Workplace(clips, folder / "pose_only", folder / "weights")


@pytest.fixture(autouse=True)
def home(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for -c, which looks in its own folder


@pytest.fixture
def clips(place: Workplace, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(place.clips, tmp_path / "clips")


def run_arguments(place: Workplace, output: Path, *options: str, clips: Path | None = None) -> list[str]:
    """Options given later win, as on any command line."""
    where = ["--inputs", str(clips or place.pose_only), "--weights", str(place.weights), "-o", str(output)]
    return ["run", *where, "--window", str(PLAN.frames), "--steps", "2", *options]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def lines(text: str) -> list[dict[str, Any]]:
    """Every line of stdout, each of which must be a JSON object."""
    values = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(value, dict) for value in values)
    return values


def refused(result: Result, exit_code: int, code: str) -> tuple[str, str]:
    """Message and hint of a refusal with --json. A command in the hint stands alone on its line."""
    assert result.exit_code == exit_code, result.output
    envelope = lines(result.stdout)[-1]
    assert envelope["ok"] is False and set(envelope) == {"schema", "ok", "error"}
    error = envelope["error"]
    assert error["code"] == code and set(error) - {"command"} == {"code", "message", "hint"}
    assert error["message"].endswith((".", ")")) and error["hint"], error
    assert not not_alone(error["hint"]) and len(error["message"]) < 500, error
    return error["message"], error["hint"]


# --- What run makes and says -----------------------------------------------------------------------------


def test_run_makes_the_video_without_torch(place: Workplace, tmp_path: Path) -> None:
    """In a fresh interpreter, sound and rate of the driving clip, the path alone on stdout."""
    output, listing = tmp_path / "out.mp4", tmp_path / "modules"
    command = [sys.executable, "-c", LISTING, str(listing), *run_arguments(place, output, clips=place.clips)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    with Clip(output) as clip:
        assert (clip.width, clip.height, clip.frames, clip.rate) == (PLAN.width, PLAN.height, FRAMES, RATE)
    assert len(read_frames(output)) == FRAMES
    with av.open(str(output)) as container:
        sound = container.streams.audio[0]
        samples = sum(frame.samples for frame in container.decode(sound))
        assert samples / sound.rate == pytest.approx(FRAMES / RATE, abs=0.05)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".mp4"] == ["out.mp4"]
    told = done.stderr
    assert "encoding the prompt" in told and "decoding" in told
    steps = re.findall(r"^window (\d)/2  denoise (\d)/2  \d+\.\d\d s/step  ETA \d+:\d\d$", told, re.MULTILINE)
    assert steps == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    assert "window 1/2  13 frames finished" in told and "window 2/2  7 frames finished" in told
    assert "Not used in the mode animate: src_bg.mp4, src_mask.mp4." in told
    modules = set(listing.read_text().split())
    assert "onnxruntime" in modules and not modules & HEAVY


def test_quiet_is_silent(place: Workplace, tmp_path: Path) -> None:
    result = invoke(*run_arguments(place, tmp_path / "out.mp4", "-q"))
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path / 'out.mp4'}\n", "")


def test_json_lines_end_with_the_envelope(place: Workplace, tmp_path: Path) -> None:
    arguments = run_arguments(place, tmp_path / "out.mp4", "--json", "--mode", "replace", clips=place.clips)
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    *events, envelope = lines(result.stdout)
    assert envelope["schema"] == "trt-wan/1" and envelope["ok"] is True
    data = envelope["data"]
    assert data.pop("seconds") > 0 and data.pop("fps") == pytest.approx(29.97, abs=0.01)
    assert data == {
        "result": str(tmp_path / "out.mp4"),
        "frames": FRAMES,
        "width": PLAN.width,
        "height": PLAN.height,
    }
    files = [event["data"] for event in events if event.get("code") == "weights_file"]
    assert [file["part"] for file in files] == list(PARTS) and all(file["bytes"] > 0 for file in files)
    assert {event["event"] for event in events} == {"Note", "StageStarted", "StepDone", "WindowDone"}
    steps = [event for event in events if event["event"] == "StepDone"]
    assert [(s["window"], s["step"]) for s in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(s["windows"] == s["steps"] == 2 and s["seconds"] > 0 for s in steps)
    assert steps[0]["eta"] > steps[-1]["eta"] == 0


def test_a_terminal_gets_one_line_that_is_taken_away(place: Workplace, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*TRT_WAN, *run_arguments(place, tmp_path / "out.mp4")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm", "NO_COLOR": "1"}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux says so when the other side is closed
            piece = b""
        if not piece:
            break
        shown += piece
    out, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0 and out.decode() == f"{tmp_path / 'out.mp4'}\n"
    assert b"window 2/2" in shown and b"\x1b[2K" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l"), "the cursor stays hidden"


def test_sound_is_the_files_that_is_named_else_the_driving_clips(
    place: Workplace, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pose clip's, and where that has none the face clip's. The pictures do not matter here."""
    black = np.full((3, FRAMES, PLAN.height, PLAN.width), -1, np.float32)
    monkeypatch.setattr(OpenModel, "pieces", lambda self, job, **options: iter([black]))

    def has_sound(*options: str) -> bool:
        result = invoke(*run_arguments(place, tmp_path / "o.mp4", "-y", *options, clips=clips))
        assert result.exit_code == 0, result.output
        with Clip(tmp_path / "o.mp4") as clip:
            return clip.has_sound

    tone = write_sound(tmp_path / "tone.m4a", 1)
    write_clip(clips / "src_pose.mp4")
    assert not has_sound()
    assert has_sound("--audio", str(tone))
    write_clip(clips / "src_face.mp4", (512, 512), sound=tone)
    assert has_sound()


def cpu_seconds(command: list[str]) -> float:
    """The least of five: other tests run beside this one."""
    times = []
    for _ in range(5):
        start = os.times()
        subprocess.run(command, capture_output=True, check=True)
        end = os.times()
        times.append(end.children_user + end.children_system - start.children_user - start.children_system)
    return min(times)


@pytest.mark.parametrize(("command", "option"), [("run", "--pose-strength"), ("preprocess", "--retarget")])
def test_help_is_quick_and_imports_nothing_heavy(command: str, option: str, tmp_path: Path) -> None:
    """Beside what this machine takes for two packages: numpy alone would be as long again."""
    unit = cpu_seconds([sys.executable, "-c", "import asyncio, click"])
    assert cpu_seconds([*TRT_WAN, command, "--help"]) < 5 * unit
    listing = tmp_path / "modules"
    shown = subprocess.run(
        [sys.executable, "-c", LISTING, str(listing), command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    modules = set(listing.read_text().split())
    assert option in shown and "click" in modules and not modules & SLOW_TO_IMPORT


# --- Ctrl-C ----------------------------------------------------------------------------------------------


def start(command: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    pytest.fail(f"{text!r} never came:\n{''.join(seen)}")


@pytest.mark.parametrize(
    "stop", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)]
)
def test_a_signal_keeps_the_finished_windows(place: Workplace, tmp_path: Path, stop: signal.Signals) -> None:
    output = tmp_path / "out.mp4"
    process = start([*TRT_WAN, *run_arguments(place, output, "--steps", "40")])
    read_until(process, "window 2/2  denoise 1/40")
    process.send_signal(stop)
    if stop == signal.SIGHUP:
        process.send_signal(stop)  # a terminal and its shell send it both
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == ""
    stopped = re.search(r"Error: Stopped in window 2 of 2, after step (\d+) of 40\.", err)
    assert stopped and int(stopped[1]) < 40, err
    assert max(map(int, re.findall(r"denoise (\d+)/40", err)), default=1) == int(stopped[1])
    partial = tmp_path / "out.partial.mp4"
    assert f"The {FIRST_WINDOW} finished frames are in {partial}." in err
    assert "Go on after the last finished window:\ntrt-wan run" in err and "--resume" in err
    assert {path.name for path in tmp_path.iterdir()} == {partial.name, f"{partial.name}.state"}
    assert len(read_frames(partial)) == FIRST_WINDOW
    with Clip(partial) as clip:
        assert clip.rate == RATE and clip.has_sound


@pytest.mark.parametrize("suffix", [".mp4", pytest.param(".webm", marks=pytest.mark.long)])
def test_a_killed_run_leaves_its_finished_windows(place: Workplace, tmp_path: Path, suffix: str) -> None:
    """All of them, once they are told. The next run says so, and leaves them alone."""
    output = tmp_path / f"out{suffix}"
    process = start([*TRT_WAN, *run_arguments(place, output, "--steps", "40")])
    read_until(process, "window 1/2  13 frames finished")
    process.kill()
    process.communicate()
    partial = tmp_path / f"out.partial{suffix}"
    kept = {partial.name, f"{partial.name}.state"}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, f".out{suffix}.lock"}
    before = partial.read_bytes()
    found = measured(partial)
    assert set(found.frames.values()) == {FIRST_WINDOW} and found.start == 0 and found.sound_end
    result = invoke(*run_arguments(place, output, "--segment", "vae=none", "-y"))  # fails before a frame
    assert result.exit_code != 0
    result = invoke(*run_arguments(place, output, "-y"))
    assert result.exit_code == 0 and f"left alone: {partial}." in result.stderr
    assert "An earlier run can be gone on with:\ntrt-wan run" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*kept, output.name, "out.json"}
    assert partial.read_bytes() == before


def test_a_second_run_with_the_same_output_is_refused_at_once(place: Workplace, tmp_path: Path) -> None:
    """Before it prepares anything, also by another name of the output."""
    output = tmp_path / "out.mp4"
    (tmp_path / "link.mp4").symlink_to("out.mp4")
    process = start([*TRT_WAN, *run_arguments(place, output, "--steps", "100")])
    read_until(process, "window 1/2  denoising")
    for name in ("out.mp4", "link.mp4"):
        result = invoke(*run_arguments(place, tmp_path / name, "--json"))
        assert lines(result.stdout)[0]["error"]["code"] == "output_unwritable", "no event comes before"
        message, _ = refused(result, 1, "output_unwritable")
        assert message == f"Another run is writing {tmp_path / name}."
    clip = str(place.pose_only / "src_pose.mp4")
    reference = str(place.pose_only / "src_ref.png")
    weights = ["--weights", str(place.weights)]
    result = invoke("run", reference, clip, *weights, "-o", str(output), "--json")
    assert refused(result, 1, "output_unwritable")[0] == f"Another run is writing {output}."
    assert not (tmp_path / "out.inputs").exists()
    process.kill()
    process.communicate()


def test_an_output_that_is_an_input_is_refused(place: Workplace, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(clips / "src_face.mp4")
    os.link(next(place.weights.glob("wan2.1_vae*")), tmp_path / "weights.mp4")
    tone = write_sound(tmp_path / "tone.mp4", 1)
    before = {path: path.read_bytes() for path in (*clips.iterdir(), tone)}
    for name in (clips / "src_pose.mp4", tmp_path / "link.mp4", tmp_path / "weights.mp4", tone):
        arguments = run_arguments(place, name, "-y", "--json", "--audio", str(tone), clips=clips)
        message, _ = refused(invoke(*arguments), 2, "usage")
        assert message.startswith(f"{name} is an input of this job")
    reference, clip = clips / "src_ref.png", clips / "src_pose.mp4"
    result = invoke("run", str(reference), str(clip), "-o", str(clip), "-y", "--json")
    assert "is an input of this job" in refused(result, 2, "usage")[0]
    inputs = shutil.copytree(clips, tmp_path / "out.inputs")
    arguments = ["run", str(reference), str(inputs / "src_pose.mp4"), "-o", str(tmp_path / "out.mp4")]
    message, _ = refused(invoke(*arguments, "--weights", str(place.weights), "-y", "--json"), 2, "usage")
    assert message.startswith(f"{inputs / 'src_pose.mp4'} is an input of this job")
    assert all(path.read_bytes() == data for path, data in before.items())


def test_ctrl_c_in_the_first_window_leaves_nothing(place: Workplace, tmp_path: Path) -> None:
    process = start([*TRT_WAN, *run_arguments(place, tmp_path / "out.mp4", "--steps", "200", "--json")])
    assert process.stdout is not None
    before = [next(line for line in process.stdout if '"StepDone"' in line)]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    envelope = lines("".join(before) + out)[-1]
    assert envelope["error"]["code"] == "interrupted" and "window 1 of 2" in envelope["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_a_second_ctrl_c_ends_at_once(place: Workplace, tmp_path: Path) -> None:
    process = start([sys.executable, "-c", STUCK, *run_arguments(place, tmp_path / "out.mp4")])
    read_until(process, "window 2/2  denoising")
    process.send_signal(signal.SIGINT)
    read_until(process, "Stopping as soon as nothing is lost; press Ctrl-C again to stop at once.")
    assert process.poll() is None
    time.sleep(0.2)  # a signal in the last microseconds of the handler waits for the end of a C call
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in err
    partial = tmp_path / "out.partial.mp4"
    assert "Error: Stopped at once." in err and f"The {FIRST_WINDOW} finished frames are in {partial}." in err
    assert err.splitlines()[-1].endswith("--resume")
    assert len(read_frames(partial)) == FIRST_WINDOW


# `trt-wan …` that writes its last frames slowly: python -c SLOWLY …
SLOWLY = """
import time
from trt_wan.runtime.video.writer import VideoWriter

finish = VideoWriter.finish
VideoWriter.finish = lambda self: (time.sleep(3), finish(self))[1]
from trt_wan.__main__ import main
main()
"""


def test_ctrl_c_while_the_last_frames_are_written_lets_them(place: Workplace, tmp_path: Path) -> None:
    process = start([sys.executable, "-c", SLOWLY, *run_arguments(place, tmp_path / "out.mp4")])
    read_until(process, "writing the last frames")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, f"{tmp_path / 'out.mp4'}\n")
    assert "Finishing the video: its last frames are being written; press Ctrl-C again" in err
    assert "The video was finished before it could be stopped." in err
    assert len(read_frames(tmp_path / "out.mp4")) == FRAMES


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_line_ends_quietly(stop: signal.Signals) -> None:
    """While the program is being imported."""
    slow = "import sys; sys.path.insert(0, sys.argv.pop(1)); from trt_wan.__main__ import main; main()"
    for arguments, said in ((["list"], ("", "Error: Stopped at once.\n")), (["list", "--json"], None)):
        with tempfile.TemporaryDirectory() as folder:  # a click that never comes
            Path(folder, "click.py").write_text("print('here', flush=True)\nwhile True: pass\n")
            process = start([sys.executable, "-c", slow, folder, *arguments])
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            process.send_signal(stop)
            out, err = process.communicate(timeout=10)
        assert process.returncode == 130
        if said is None:
            assert lines(out)[-1]["error"]["code"] == "interrupted"
        else:
            assert (out, err) == said


def test_ignored_signals_stay_ignored(place: Workplace, tmp_path: Path) -> None:
    """nohup trt-wan … goes on when its terminal closes."""
    arguments = run_arguments(place, tmp_path / "out.mp4")
    process = start(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *TRT_WAN, *arguments])
    read_until(process, "window 1/2  denoising")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(read_frames(tmp_path / "out.mp4")) == FRAMES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize("to", [">/dev/full", ">&-", "| true"])
def test_a_video_whose_path_cannot_be_printed_is_written(place: Workplace, tmp_path: Path, to: str) -> None:
    output = tmp_path / "out.mp4"
    command = f"set -o pipefail; {shlex.join([*TRT_WAN, *run_arguments(place, output, '-q')])} {to}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.startswith(f"Error: {output} is written, but its path could not be printed.\n")
    assert len(read_frames(output)) == FRAMES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_json_that_cannot_be_printed_ends_the_job_before_it_computes(
    place: Workplace, tmp_path: Path
) -> None:
    command = f"{shlex.join([*TRT_WAN, *run_arguments(place, tmp_path / 'out.mp4', '--json')])} >/dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("Error: Standard output cannot be written (No space left on device).\n")


def test_ctrl_c_ends_a_build_which_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    process = start(as_argv(BUILD))
    read_until(process, "text_encoder_layer  exported in")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (
        (process.returncode, out) == (130, "") and "Error: Stopped at once." in err and "Traceback" not in err
    )
    assert "Finished graphs stay: the same command goes on from there." in err
    left = graph_set(TINY, PLAN).missing()
    assert 0 < len(left) < len(graph_set(TINY, PLAN).names) and "text_encoder_layer" not in left


def test_ctrl_c_is_the_callers_own_again_after_a_run(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(signal.SIGINT)]

    def one_frame(self: OpenModel, job: Job, **options: object) -> Iterator[Array]:
        handlers.append(signal.getsignal(signal.SIGINT))
        yield np.full((3, 1, PLAN.height, PLAN.width), -1, np.float32)

    monkeypatch.setattr(OpenModel, "pieces", one_frame)
    assert invoke(*run_arguments(place, tmp_path / "out.mp4")).exit_code == 0
    assert handlers[1] is not handlers[0] and signal.getsignal(signal.SIGINT) is handlers[0]


def test_a_reader_that_goes_away_ends_the_run_quietly(place: Workplace, tmp_path: Path) -> None:
    process = start([*TRT_WAN, *run_arguments(place, tmp_path / "out.mp4", "--json")])
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1 and err == ""
    assert not (tmp_path / "out.mp4").exists()


# --- Refusals --------------------------------------------------------------------------------------------


def unlink(*names: str) -> Callable[[Path], None]:
    def change(clips: Path) -> None:
        for name in names:
            (clips / name).unlink()

    return change


def only_an_odd_face(clips: Path) -> None:
    unlink("src_pose.mp4")(clips)
    write_reference(clips / "src_ref.png", (70, 50))


@dataclass(frozen=True)
class Refusal:
    exit_code: int
    code: str
    says: str
    fix: str
    options: tuple[str, ...] = ()
    change: Callable[[Path], object] = lambda clips: None


REFUSALS = {
    "pose not of 16": Refusal(
        1,
        "input_unusable",
        "src_pose.mp4 is 60x42; both sides must be multiples of 16.",
        "64x48",
        change=lambda clips: write_clip(clips / "src_pose.mp4", (60, 42)),
    ),
    "reference not of 16, face only": Refusal(
        1, "input_unusable", "src_ref.png is 70x50", "64x48", change=only_an_odd_face
    ),
    "lengths differ": Refusal(
        1,
        "input_unusable",
        "src_pose.mp4 has 20, src_face.mp4 has 12",
        "Cut them to the same length",
        change=lambda clips: write_clip(clips / "src_face.mp4", (512, 512), 12),
    ),
    "face not 512": Refusal(
        1,
        "input_unusable",
        "src_face.mp4 is 256x256 where 512x512 is needed.",
        "scale=512:512",
        change=lambda clips: write_clip(clips / "src_face.mp4", (256, 256)),
    ),
    "unreadable video": Refusal(
        1,
        "input_unusable",
        "src_pose.mp4 cannot be read as a video",
        "ffmpeg -i",
        change=lambda clips: (clips / "src_pose.mp4").write_bytes(b"no video" * 200),
    ),
    "cut short video": Refusal(
        1,
        "input_unusable",
        "src_face.mp4",
        "ffmpeg -i",
        change=lambda clips: os.truncate(
            clips / "src_face.mp4", (clips / "src_face.mp4").stat().st_size // 2
        ),
    ),
    "empty video": Refusal(
        1,
        "input_unusable",
        "src_pose.mp4 is empty (0 bytes).",
        "Copy or download it again",
        change=lambda clips: (clips / "src_pose.mp4").write_bytes(b""),
    ),
    "unreadable reference": Refusal(
        1,
        "input_unusable",
        "src_ref.png cannot be read as a picture",
        "ffmpeg -i",
        change=lambda clips: (clips / "src_ref.png").write_bytes(b"no picture"),
    ),
    "no reference": Refusal(
        2, "usage", "There is no src_ref.png in", "--inputs DIR", change=unlink("src_ref.png")
    ),
    "no such folder": Refusal(
        2, "usage", "There is no src_ref.png in nowhere.", "--inputs DIR", ("--inputs", "nowhere")
    ),
    "replace without mask": Refusal(
        2, "usage", "lacks src_mask.mp4.", "--mode animate", ("--mode", "replace"), unlink("src_mask.mp4")
    ),
    "replace without background": Refusal(
        2, "usage", "lacks src_bg.mp4.", "--mode animate", ("--mode", "replace"), unlink("src_bg.mp4")
    ),
    "neither pose nor face": Refusal(
        2,
        "usage",
        "neither a pose clip nor a face clip",
        "src_pose.mp4 and src_face.mp4",
        change=unlink("src_pose.mp4", "src_face.mp4"),
    ),
    "window not 4k+1": Refusal(
        2, "usage", "A window of 12 frames", "--window 9 or --window 13", ("--window", "12")
    ),
    "window 0": Refusal(2, "usage", "A window of 0 frames", "--window 5", ("--window", "0")),
    "window negative": Refusal(2, "usage", "A window of -3 frames", "--window 5", ("--window", "-3")),
    "overlap 2": Refusal(
        2, "usage", "An overlap of 2 frames", "--overlap 1 or --overlap 5", ("--overlap", "2")
    ),
    "overlap of a whole window": Refusal(
        2, "usage", "An overlap of 5 frames", "--window 9", ("--overlap", "5", "--window", "5")
    ),
    "steps 0": Refusal(2, "usage", "0 steps are not possible", "--steps from 1 to 1000", ("--steps", "0")),
    "shift 0": Refusal(2, "usage", "A shift of 0.0", "--shift 5", ("--shift", "0")),
    "guidance 0.5": Refusal(2, "usage", "A guidance of 0.5", "--guidance 1", ("--guidance", "0.5")),
    "guidance nan": Refusal(2, "usage", "A guidance of nan", "--guidance 1", ("--guidance", "nan")),
    "pose strength": Refusal(
        2, "usage", "A pose strength of -1", "--pose-strength 0", ("--pose-strength", "-1")
    ),
    "face strength": Refusal(
        2, "usage", "A face strength of nan", "--face-strength 0", ("--face-strength", "nan")
    ),
    "seed too large": Refusal(
        2, "usage", f"The seed {2**64} does not fit", "--seed 0", ("--seed", str(2**64))
    ),
    "a random seed": Refusal(
        2, "usage", f"-1 is not a number from 0 to {2**64 - 1}", "use --seed $RANDOM", ("--seed", "-1")
    ),
    "unknown weights folder": Refusal(
        1,
        "weights_unusable",
        "weights folder nowhere",
        "--weights DIR",
        ("--weights", "nowhere"),
    ),
    "unknown kind of video": Refusal(2, "usage", "ends in .avi", ".mp4", ("-o", "o.avi")),
    "output folder missing": Refusal(
        1, "output_unwritable", "There is no folder", "mkdir -p", ("-o", "nowhere/o.mp4")
    ),
    # found by click itself
    "steps garbage": Refusal(2, "usage", "'many' is not a valid integer", "run --help", ("--steps", "many")),
    "sampler garbage": Refusal(2, "usage", "'magic' is not one of", "run --help", ("--sampler", "magic")),
    "unknown option": Refusal(2, "usage", "No such option", "run --help", ("--stepz", "3")),
    "unknown file": Refusal(
        2, "usage", "'nowhere.safetensors' does not exist", "run --help", ("--vae", "nowhere.safetensors")
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_run_refuses(
    place: Workplace, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With one clear sentence, the fix and the right exit code, before any computing, without an output."""
    monkeypatch.chdir(tmp_path)
    case = REFUSALS[name]
    case.change(clips)
    result = invoke(*run_arguments(place, Path("o.mp4"), "--json", *case.options, clips=clips))
    message, hint = refused(result, case.exit_code, case.code)
    assert case.says in message and case.fix in hint, (message, hint)
    assert not {"text", "image", "denoise"} & {event.get("stage") for event in lines(result.stdout)}
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_a_refusal_in_words(place: Workplace, tmp_path: Path) -> None:
    """One line that says what, one that says what to do, both on stderr, quiet or not."""
    for options in ([], ["-q"]):
        result = invoke(*run_arguments(place, tmp_path / "o.mp4", "--overlap", "2", *options))
        *_, message, hint = result.stderr.splitlines()
        assert message == "Error: An overlap of 2 frames is not possible: it must be 4k+1."
        assert hint == "Use --overlap 1 or --overlap 5; the model was trained with 1 and 5."
        assert (result.exit_code, result.stdout) == (2, "")


def test_missing_tensors_are_counted(place: Workplace, tmp_path: Path) -> None:
    file = next(place.weights.glob("*animate*.safetensors"))
    tensors = TensorFile(file)
    gone = ["blocks.0.self_attn.q.weight", "blocks.3.ffn.2.bias", "head.head.weight", "img_emb.proj.0.bias"]
    save_file(
        {name: tensors.read(name) for name in tensors if name not in gone}, tmp_path / "less.safetensors"
    )
    options = ["--json", "--transformer", str(tmp_path / "less.safetensors")]
    message, hint = refused(
        invoke(*run_arguments(place, tmp_path / "o.mp4", *options)), 1, "weights_unusable"
    )
    assert "4 of 227 tensors are missing, such as " in message
    assert any(message.endswith(f" {name}.") for name in gone)
    assert "wan2.2_animate_14B" in hint


def test_an_output_that_exists_is_kept_without_y(place: Workplace, tmp_path: Path) -> None:
    output = tmp_path / "o.mp4"
    output.write_bytes(b"precious")
    arguments = run_arguments(place, output, "--steps", "1", "--json")
    message, hint = refused(invoke(*arguments), 1, "output_unwritable")
    assert f"{output} exists already." == message and hint == "Choose another name, or add -y to replace it."
    assert output.read_bytes() == b"precious"
    assert invoke(*arguments, "-y").exit_code == 0
    assert len(read_frames(output)) == FRAMES


def test_an_output_that_cannot_be_written(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rights of a folder do not stop root, who runs the tests in many containers."""
    opened = Path.open

    def denied(path: Path, mode: str = "r", **options: Any) -> Any:
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", denied)
    result = invoke(*run_arguments(place, tmp_path / "o.mp4", "--json"))
    message, hint = refused(result, 1, "output_unwritable")
    assert message == f"The folder {tmp_path} cannot be written to." and "that you can write to" in hint
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_too_short(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32e9))
    with pytest.raises(MemoryShort, match="needs about .* GB in fp32 on the CPU; 32 GB are here") as caught:
        require_memory(ANIMATE_14B, Plan())
    needed = int(re.findall(r"about (\d+) GB", caught.value.message)[0])
    assert needed > 4 * 17.3 + 4 * 5.6, "17.3 G parameters of the transformer and 5.6 G of umT5"
    require_memory(TINY, PLAN)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1e6))
    result = invoke(*run_arguments(place, tmp_path / "o.mp4", "--json"))
    _, hint = refused(result, 1, "memory_short")
    assert "smaller size or window" in hint and list(tmp_path.iterdir()) == []


def test_two_onnx_runtimes(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_wan.runtime.executors.onnxruntime.version", lambda package: "1.23.0")
    result = invoke(*run_arguments(place, tmp_path / "o.mp4", "--json"))
    message, hint = refused(result, 1, "environment_broken")
    assert message.startswith("onnxruntime 1.23.0 and onnxruntime-gpu 1.23.0 are both installed")
    assert hint == "Run:\npip uninstall -y onnxruntime onnxruntime-gpu\npip install onnxruntime-gpu"
    assert list(tmp_path.iterdir()) == []
    assert metadata.version("click"), "the real function is in place"


@pytest.mark.parametrize(
    ("error", "exit_code", "code", "says"),
    [
        (
            OSError(28, "No space left on device", "/tmp/x"),
            1,
            "output_unwritable",
            "/tmp/x: the disk is full.",
        ),
        (OSError("odd"), 1, "output_unwritable", "A file: odd."),
        (
            MemoryError("Unable to allocate 3 GiB"),
            1,
            "memory_short",
            "The memory is full (Unable to allocate 3 GiB).",
        ),
        (KeyboardInterrupt(), 130, "interrupted", "Stopped at once."),
    ],
)
def test_what_python_raises_is_told_like_our_own(
    place: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    exit_code: int,
    code: str,
    says: str,
) -> None:
    def fail(*args: object, **options: object) -> None:
        error.add_note("The 5 finished frames are in o.partial.mp4.")
        raise error

    monkeypatch.setattr(trt_wan.runtime.render, "render", fail)
    message, hint = refused(invoke(*run_arguments(place, tmp_path / "o.mp4", "--json")), exit_code, code)
    assert message == says and hint.endswith("The 5 finished frames are in o.partial.mp4.")


@pytest.mark.parametrize(
    ("number", "says", "begins"),
    [
        (errno.ENOSPC, "the disk is full", "Free some space"),
        (errno.EDQUOT, "the disk is full", "Free some space"),
        (errno.EROFS, "Read-only file system", "Check the disk and its rights"),
        (errno.EACCES, "Permission denied", "Check the disk and its rights"),
    ],
)
def test_a_cache_that_cannot_be_written_names_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str, begins: str
) -> None:
    """Elsewhere the variable would be no help."""
    home = tmp_path / "home"
    monkeypatch.setenv("TRT_WAN_HOME", str(home))
    for file, is_cache in ((home / "graphs" / "a.onnx", True), (tmp_path / "models" / "a", False)):

        def fail(*args: object, file: Path = file) -> None:
            raise OSError(number, os.strerror(number), str(file))

        monkeypatch.setattr("trt_wan.runtime.weights.tiny.write_tiny_weights", fail)
        message, hint = refused(invoke("weights", "tiny", "x", "--json"), 1, "output_unwritable")
        first, *command = hint.splitlines()
        assert message == f"{file}: {says}." and first.startswith(begins)
        assert command == ['export TRT_WAN_HOME="$PWD/trt-wan-cache"'] * is_cache


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """Python's error of a write has no name."""
    with pytest.raises(OSError) as bare, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert bare.value.filename is None
    with pytest.raises(OSError) as caught, named(tmp_path / "a.onnx"):
        raise bare.value
    assert caught.value.filename == str(tmp_path / "a.onnx")


def test_demo_looks_at_the_path_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    message, hint = refused(invoke("demo", "-o", "no dir/x.mp4", "--json"), 1, "output_unwritable")
    assert message == "There is no folder no dir." and hint == "Make it:\nmkdir -p 'no dir'"
    (tmp_path / "mine.mp4").touch()
    message, _ = refused(invoke("demo", "-o", "mine.mp4", "--json"), 1, "output_unwritable")
    assert message == "mine.mp4 exists already." and not (tmp_path / "home").exists()


@pytest.mark.parametrize("in_the_way", ["a read-only folder", "a file", "a file of its name", "a dead link"])
def test_a_folder_that_cannot_be_made_is_not_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_the_way: str
) -> None:
    place = tmp_path / "place"
    folder, into = place if in_the_way == "a file of its name" else place / "new", place / "ComfyUI"
    if in_the_way == "a read-only folder":
        place.mkdir()
        allowed = os.access  # rights do not bind root, who may run the tests
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and allowed(path, mode))
    elif in_the_way == "a dead link":
        place.symlink_to(tmp_path / "gone")
    else:
        place.touch()
    output = str(folder / "x.mp4")
    message, hint = refused(invoke("demo", "-o", output, "--json"), 1, "output_unwritable")
    assert message == f"There is no folder {folder}."
    assert hint == "It cannot be made there: choose a folder that you can write to."
    message, hint = refused(invoke("pull", "--into", str(into), "--json"), 2, "usage")
    assert message == f"There is no folder {into}." and "mkdir" not in hint
    assert hint.endswith("This one cannot be made there: choose a place that you can write to.")


def test_a_prompt_that_is_cut_says_so(place: Workplace, tmp_path: Path) -> None:
    """Before anything is computed; also where its features are known, and for the negative prompt."""
    long = "dance " * 700
    for prompts in (("--prompt", long), ("--negative-prompt", long, "--guidance", "2")):
        for _ in range(2):
            arguments = run_arguments(place, tmp_path / "o.mp4", "--json", "-y", "--steps", "1", *prompts)
            events = lines(invoke(*arguments).stdout)
            (k,) = [k for k, event in enumerate(events) if event.get("code") == "prompt_cut"]
            tokens = events[k]["data"]["tokens"]
            assert events[k]["data"] == {"tokens": tokens, "read": 512, "prompt": long} and tokens > 700
            assert f"has {tokens} tokens, and the model reads the first 512." in events[k]["text"]
            assert len(events[k]["text"]) < 200
            computed = [j for j, event in enumerate(events) if event.get("stage") in ("text", "image")]
            assert k < min(computed)
    arguments = run_arguments(
        place, tmp_path / "o.mp4", "--json", "-y", "--steps", "1", "--prompt", "dance " * 100
    )
    assert "prompt_cut" not in invoke(*arguments).stdout


def test_a_known_prompt_is_not_encoded(place: Workplace, tmp_path: Path) -> None:
    def stages(*options: str) -> list[str]:
        result = invoke(*run_arguments(place, tmp_path / "o.mp4", "--json", "-y", "--steps", "1", *options))
        return [event["stage"] for event in lines(result.stdout) if event.get("event") == "StageStarted"]

    stages("--prompt", "a known prompt")
    assert "text" not in stages("--prompt", "a known prompt")
    assert "text" in stages("--prompt", "a known prompt", "--no-text-cache")


@pytest.mark.parametrize("there", [False, True])
def test_cudas_sentence_is_for_machines_with_a_gpu(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """And for those who ask for TensorRT."""

    def no_driver(ordinal: int) -> None:
        raise RuntimeError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setattr("cuda.core.Device", no_driver)
    for module in ("device.gpu", "opening.model"):
        monkeypatch.setattr(f"trt_wan.runtime.{module}.has_nvidia_gpu", lambda: there)
    arguments = run_arguments(place, tmp_path / "o.mp4", "-y", "--steps", "1")
    told = invoke(*arguments).stderr.splitlines()
    (k,) = [k for k, line in enumerate(told) if line.startswith("executor = onnxruntime on the CPU")]
    if there:
        assert told[k].endswith("CPU (No CUDA device can be used (libcuda.so.1: cannot open))")
        assert told[k + 1].startswith("Install an NVIDIA driver")
    else:
        assert told[k].endswith("CPU (No NVIDIA GPU is here)") and "libcuda" not in "".join(told)
    told = invoke(*arguments, "--executor", "tensorrt").stderr
    assert "Error: No " in told and "libcuda.so.1: cannot open" in told and "more" not in told


def test_a_mistake_of_ours_ends_with_an_envelope_and_its_traceback(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("shape (1, 2)")

    monkeypatch.setattr(trt_wan.runtime.render, "render", fail)
    result = invoke(*run_arguments(place, tmp_path / "o.mp4", "--json"))
    assert isinstance(result.exception, AssertionError)
    error = lines(result.stdout)[-1]["error"]
    assert (result.exit_code, error["code"]) == (1, "failed")
    assert error["message"] == "AssertionError: shape (1, 2)" and "report it" in error["hint"]


# --- Graphs ----------------------------------------------------------------------------------------------


def test_graphs_not_built(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint is the very command that made the graphs of all other tests here."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "elsewhere"))
    arguments = run_arguments(place, tmp_path / "o.mp4", "--json", "--no-build")
    message, hint = refused(invoke(*arguments), 1, "graph_unusable")
    assert "the model tiny for 64x48, 13 frames per window, fp32, are not built" in message
    assert hint == f"Run:\n{BUILD}"
    assert list(tmp_path.iterdir()) == []


def test_the_hint_for_damaged_graphs_mends_them(
    place: Workplace, tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte changed, the size kept. Exporting is replaced by copying the good graphs."""
    good = graphs_folder(TINY, PLAN)
    home = shutil.copytree(tiny_home, tmp_path / "home")
    monkeypatch.setenv("TRT_WAN_HOME", str(home))
    graph = graphs_folder(TINY, PLAN) / "attn_in.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 0xFF
    graph.write_bytes(content)
    arguments = run_arguments(place, tmp_path / "o.mp4", "--json", "--no-build")
    message, hint = refused(invoke(*arguments), 1, "graph_unusable")
    count = len(list(good.glob("*.onnx")))
    assert f"are not complete: 1 of {count} are missing or damaged ({graph.parent})" in message
    assert hint == f"Run:\n{BUILD}"

    def copy(network: Network, model: object, plan: object, path: Path) -> None:
        shutil.copyfile(good / f"{network.name}.onnx", path)

    monkeypatch.setattr("trt_wan.build.graphs.export", copy)
    built = invoke(*hint.removeprefix("Run:\ntrt-wan ").split(), "--json")
    assert built.exit_code == 0 and lines(built.stdout)[-1]["data"]["graphs"] == 1, "that one alone"
    assert invoke(*arguments).exit_code == 0
    assert len(read_frames(tmp_path / "o.mp4")) == FRAMES


def test_a_second_build_does_nothing_quickly(tmp_path: Path) -> None:
    listing = tmp_path / "modules"
    build = as_argv(BUILD)[len(TRT_WAN) :]
    command = [sys.executable, "-c", LISTING, str(listing), *build, "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    *notes, envelope = lines(done.stdout)
    assert done.returncode == 0 and envelope["ok"] and done.stderr == ""
    assert {event["event"] for event in notes} <= {"Note"}
    assert envelope["data"]["result"] == str(graphs_folder(TINY, PLAN))
    assert envelope["data"]["graphs"] == 0 and envelope["data"]["seconds"] < 0.1
    assert seconds < 1.5 and not set(listing.read_text().split()) & HEAVY


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxscript"])
def test_build_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    build = as_argv(BUILD)[len(TRT_WAN) :]
    done = subprocess.run([sys.executable, "-c", LACKING, package, *build], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    *_, message, hint, command = done.stderr.splitlines()
    assert message.startswith("Error: ") and package in message
    assert (hint, command) == ("Run:", install_command("build"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "garbage"], "'garbage' is not a size such as 832x480."),
        (["--size", "832x"], "'832x' is not a size"),
        (["--size", "830x480"], "The width is 830, which is not a multiple of 16."),
        (["--size", "832x0"], "'832x0' is not a size"),
        (["--size", "８３２x480"], "'８３２x480' is not a size"),
        (["--size", "9" * 5000 + "x480"], f"'{'9' * 40}…' is not a size"),
        (["--size", "99984x99984"], "A video of 99984x99984 is too large: a side has at most 8192 pixels"),
        (["--size", "8192x8192"], "A video of 8192x8192 is too large"),
        (["--window", "99999997"], "A window of 99999997 frames is not possible: 4089 is the most."),
        (["--window", "9" * 4000], f"A window of {'9' * 40}… frames is not possible"),
        (["--size", "1280x720", "--window", "4089"], "4089 frames at 1280x720 are 3686400 tokens"),
        (["--window", "12"], "A window of 12 frames is not possible"),
        (["--model", "15b"], "'15b' is not one of '14b', 'tiny'"),
    ],
)
def test_build_refuses(options: list[str], says: str) -> None:
    message, _ = refused(invoke("build", "--json", *options), 2, "usage")
    assert says in message
    in_words = invoke("build", *options)
    assert (in_words.exit_code, in_words.stdout) == (2, "") and f"Error: {says}" in in_words.stderr.replace(
        "Invalid value for '--size': ", ""
    ).replace("Invalid value for '--model': ", "")


def test_weights_tiny(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "weights"
    result = invoke("weights", "tiny", str(folder), "--json")
    (envelope,) = lines(result.stdout)
    data = envelope["data"]
    assert result.exit_code == 0 and data["result"] == str(folder)
    assert {Path(file) for file in data["files"]} == set(folder.iterdir())
    assert data["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    plain = invoke("weights", "tiny", str(tmp_path / "again"))
    assert (plain.exit_code, plain.stdout) == (0, f"{tmp_path / 'again'}\n")
    assert all(
        (tmp_path / "again" / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir()
    )


# --- An open model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(place: Workplace) -> Iterator[OpenModel]:
    """One model for all jobs."""
    with open_model(WeightFiles((place.weights,)), Settings(executor="onnxruntime")) as opened:
        yield opened


def frames(model: OpenModel, job: Job) -> Picture:
    pictures = list(model.stream(job))
    assert all(p.shape == (PLAN.height, PLAN.width, 3) and p.dtype == np.uint8 for p in pictures)
    return np.stack(pictures)


def make_job(place: Workplace, clips: Path | None = None, **changes: Any) -> Job:
    inputs = Inputs.from_folder(clips or place.clips, changes.get("mode", "animate"))
    settings = {"window": PLAN.frames, "steps": 2, "seed": 7} | changes
    return Job(inputs=inputs, **settings)


@pytest.fixture(scope="module")
def plain(place: Workplace, model: OpenModel, tiny_home: Path) -> Picture:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        return frames(model, make_job(place))


def test_the_same_seed_gives_the_same_frames(model, place: Workplace, plain: Picture) -> None:
    assert len(plain) == FRAMES and plain.std() > 10
    assert np.array_equal(frames(model, make_job(place)), plain)


@pytest.mark.parametrize("seed", [8, -1])
def test_another_seed_gives_other_frames(model, place: Workplace, plain: Picture, seed: int) -> None:
    assert not np.array_equal(frames(model, make_job(place, seed=seed)), plain)


@pytest.mark.parametrize("gone", [None, "pose", "face"])
def test_replace_needs_only_one_driving_clip(
    place: Workplace, model: OpenModel, plain: Picture, gone: str | None
) -> None:
    job = make_job(place, mode="replace")
    replaced = frames(model, replace(job, inputs=replace(job.inputs, **{gone: None})) if gone else job)
    assert len(replaced) == FRAMES and not np.array_equal(replaced, plain)


@pytest.mark.parametrize("name", ["pose", "face"])
def test_strength_0_equals_no_clip(place: Workplace, model: OpenModel, plain: Picture, name: str) -> None:
    """Without a pose clip the canvas is the reference's, which has the pose clip's size here."""
    job = make_job(place)
    without = frames(model, replace(job, inputs=replace(job.inputs, **{name: None})))
    off = frames(model, replace(job, **{f"{name}_strength": 0.0}))
    assert len(without) == FRAMES and np.array_equal(off, without)
    assert not np.array_equal(off, plain)


def test_a_job_refuses_a_sampler_that_does_not_exist(place: Workplace) -> None:
    with pytest.raises(UsageError, match="no sampler called 'magic'"):
        make_job(place, sampler="magic")


def test_audio_without_sound_is_refused(place: Workplace, tmp_path: Path) -> None:
    silent = place.clips / "src_face.mp4"
    with av.open(str(silent)) as container:
        assert not container.streams.audio, "the face clip is meant to be silent"
    output = tmp_path / "out.mp4"
    message, hint = refused(
        invoke(*run_arguments(place, output, "--audio", str(silent)), "--json"), 1, "input_unusable"
    )
    assert message == f"{silent} has no sound." and "--audio" in hint
    assert list(tmp_path.iterdir()) == []
