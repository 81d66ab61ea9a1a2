"""`trt-wan live` with the tiny model: files, a camera over loopback, stdout, Ctrl-C, bad input."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import live_on_gpu
import numpy as np
import pytest
from click.testing import CliRunner, Result
from live_sender import free_port
from made_clips import FakePeople
from tiny_job import PLAN, TRT_WAN, prepare, read_frames, write_clip, write_reference, write_sound

import trt_wan.preprocess.stages
from trt_wan.cli.main import cli
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.events import Event, LiveWindow
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.live.intake import Intake
from trt_wan.runtime.live.live import CLIPS, ArrivingClips, Feed, go_live
from trt_wan.runtime.live.sources import Stream
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.render import render
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import frames_of, open_clips
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.writer import VideoWriter

TESTS = Path(__file__).parent
SIZE = PLAN.width, PLAN.height
TINY = ["--random-weights", "tiny", "--window", str(PLAN.frames), "--steps", "1"]
SOON = 120  # seconds
SENT = 4  # seconds of a camera


@pytest.fixture(autouse=True)
def graphs(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clips")
    return prepare(place, write_sound(place / "tone.m4a", 1), frames=30)


@pytest.fixture
def model() -> Iterator[OpenModel]:
    with open_model(WeightFiles(random="tiny"), Settings()) as opened:
        yield opened


class OnDemand:
    """Plays prepared clips by a clock that stands still: each look for a signal gives a frame."""

    deliver: Any

    def __init__(self, clips: Any) -> None:
        self.clips, self.sent, self.deliver = clips, 0, None
        self.width, self.height, self.rate = clips.width, clips.height, clips.rate

    def start(self, deliver: Any, ended: Any) -> None:
        self.deliver, self.ended = deliver, ended

    def stop(self) -> None:
        pass

    def send(self) -> bool:
        """For `should_stop`."""
        if self.deliver is None:
            return False
        if self.sent < self.clips.frames:
            given = {name: clip for name in CLIPS if (clip := getattr(self.clips, name)) is not None}
            k = self.sent
            self.deliver(
                float(k / self.rate), lambda: {name: frames_of(clip, [k])[0] for name, clip in given.items()}
            )
            self.sent += 1
        else:
            self.ended("the clip has ended", None)
        return False


@pytest.mark.parametrize(
    ("mode", "overlap"), [("animate", 1), pytest.param("replace", 5, marks=pytest.mark.long)]
)
def test_a_clip_that_is_played_gives_the_frames_of_run(
    mode: Any, overlap: int, folder: Path, tmp_path: Path, model: OpenModel
) -> None:
    """Three windows and more, each with its prompt, the last one filled up: the same pixels. In the mode
    replace also with a frame before the first.
    """
    inputs = Inputs.from_folder(folder, mode)
    if mode == "replace":
        inputs = replace(inputs, start_frame=inputs.reference)
    job = Job(inputs, mode=mode, window=PLAN.frames, overlap=overlap, steps=1, seed=7, sampler="lcm")
    job = replace(job, prompt="he walks | he dances | he sits")
    quality = Quality()
    render(job, model, tmp_path / "run.mkv", quality=quality, sidecar=False)
    events: list[Event] = []
    with open_clips(inputs, job.history) as clips:
        source = OnDemand(clips)
        names = tuple(name for name in CLIPS if getattr(clips, name) is not None)
        intake = Intake(clips.rate, job.window, overlap, clock=lambda: 0.0)
        live = ArrivingClips(job, clips.reference, SIZE, names, intake)
        output = VideoWriter(tmp_path / "live.mkv", *SIZE, clips.rate, quality=quality)
        went = go_live(job, model, live, source, Feed(intake), output, events.append, source.send)
    assert (went.frames_in, went.frames_out, went.dropped) == (30, 30, 0)
    assert went.windows == sum(isinstance(event, LiveWindow) for event in events) > 2
    made, expected = read_frames(tmp_path / "live.mkv"), read_frames(tmp_path / "run.mkv")
    assert len(made) == 30 and np.array_equal(made, expected)
    assert len({frame.tobytes() for frame in made}) > 20, "no still picture"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["live", *map(str, arguments)])


def told(result: Result) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events, and the data of the result."""
    *events, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert last["ok"], last
    return events, last["data"]


@pytest.mark.long
def test_a_clip_at_its_own_rate(folder: Path, tmp_path: Path) -> None:
    """By the command: 20 frames at 3 per second take 6.7 s, and are those of `run`."""
    slow = tmp_path / "slow"
    slow.mkdir()
    write_reference(slow / "src_ref.png")
    write_clip(slow / "src_pose.mp4", frames=20, rate=Fraction(3))
    write_clip(slow / "src_face.mp4", size=(512, 512), frames=20, rate=Fraction(3))
    began = time.monotonic()
    _, data = told(run("--inputs", slow, "-o", tmp_path / "live.mp4", *TINY, "--json"))
    assert time.monotonic() - began > 19 / 3
    assert (data["frames_in"], data["frames_out"], data["dropped"], data["windows"]) == (20, 20, 0, 2)
    assert 0 < data["latency_median"] <= data["latency_worst"] and data["ended"] == "the clip has ended"
    assert data["result"] == str(tmp_path / "live.mp4") and data["fps"] == 3
    assert (
        CliRunner()
        .invoke(cli, ["run", "--inputs", str(slow), "-o", str(tmp_path / "run.mp4"), *TINY])
        .exit_code
        == 0
    )
    assert np.array_equal(read_frames(tmp_path / "live.mp4"), read_frames(tmp_path / "run.mp4"))


def made_up_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_wan.preprocess.stages, "open_stages", lambda *_, **__: Stages(FakePeople()))
    monkeypatch.setattr(trt_wan.preprocess.stages, "require_finder", lambda networks: None)


def test_a_camera_over_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPEG-TS over TCP in, prepared beside the model, a file out."""
    made_up_people(monkeypatch)
    write_reference(tmp_path / "character.png")
    url = f"tcp://127.0.0.1:{free_port()}"
    begun, start = tmp_path / "begun", Stream.start
    monkeypatch.setattr(Stream, "start", lambda stream, *more: (start(stream, *more), begun.touch()))
    sending = [sys.executable, str(TESTS / "live_sender.py"), url, str(SENT), str(begun)]
    with subprocess.Popen(sending, stdout=subprocess.PIPE, text=True) as sender:
        result = run(
            *("--input", f"{url}?listen=1", "--reference", tmp_path / "character.png"),
            *("-o", tmp_path / "out.mp4", "--size", "64x48", *TINY, "--json"),
        )
        sent = int(sender.communicate(timeout=SOON)[0])
    events, data = told(result)
    assert SENT * 15 - 15 < data["frames_in"] <= min(sent, SENT * 15 + 15)
    assert data["frames_in"] == data["frames_out"] + data["dropped"] and data["frames_out"] >= PLAN.frames
    assert 0 < data["latency_median"] <= data["latency_worst"] < 60
    assert data["ended"] == f"{url}?listen=1 has ended" and data["fps"] == 15
    windows = [event for event in events if event["event"] == "LiveWindow"]
    assert [each["window"] for each in windows] == list(range(1, data["windows"] + 1))
    assert windows[-1]["frames_out"] == data["frames_out"]
    assert any(event["event"] == "Note" and event["code"] == "holds" for event in events)
    frames = read_frames(tmp_path / "out.mp4")
    assert data["frames_out"] <= len(frames) <= data["frames_in"] + 1, "dropped frames' places are filled"
    assert frames.shape[1:] == (48, 64, 3)


@pytest.mark.long
def test_a_raw_clip_is_played_and_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a lower rate than its own."""
    made_up_people(monkeypatch)
    write_reference(tmp_path / "character.png")
    write_clip(tmp_path / "dance.mp4", size=(320, 180), frames=40, rate=Fraction(20))
    _, data = told(
        run(
            *("--input", tmp_path / "dance.mp4", "--reference", tmp_path / "character.png", "--rate", "10"),
            *("-o", tmp_path / "out.mp4", "--size", "64x48", *TINY, "--json"),
        )
    )
    assert data["frames_in"] == 20 == data["frames_out"] + data["dropped"] and data["fps"] == 10
    assert len(read_frames(tmp_path / "out.mp4")) <= 20


@pytest.mark.long
def test_stdout_and_ctrl_c(folder: Path, tmp_path: Path) -> None:
    """A stream on stdout, one line a window on stderr; after Ctrl-C what came is finished, exit code 0."""
    long = tmp_path / "long"
    long.mkdir()
    write_reference(long / "src_ref.png")
    write_clip(long / "src_pose.mp4", frames=2000, rate=Fraction(20))
    with (tmp_path / "out.ts").open("wb") as out:
        process = subprocess.Popen(
            [*TRT_WAN, "live", "--inputs", str(long), "-o", "-", *TINY],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("window 2 "):
                process.send_signal(signal.SIGINT)
        assert process.wait(SOON) == 0, said
    lines = [line for line in said if line.startswith("window ")]
    assert len(lines) >= 2 and all("latency" in line and "dropped" in line for line in lines)
    assert not any("denoise" in line for line in said)
    assert "The live video is finished: stopped.\n" in said
    with av.open(str(tmp_path / "out.ts")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    out_frames = int(lines[-1].partition("out ")[2].partition(",")[0])
    in_frames = int(lines[-1].partition("in ")[2].partition(",")[0])
    assert out_frames <= len(frames) <= in_frames and frames[0].shape == (48, 64, 3)


def test_a_reader_of_stdout_that_goes(folder: Path) -> None:
    """As with `| head -c 1000`."""
    process = subprocess.Popen(
        [*TRT_WAN, "live", "--inputs", str(folder), "-o", "-", *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    *_, error, hint = process.stderr.read().decode().splitlines()
    assert process.wait(SOON) == 1
    assert error == "Error: Nothing reads the video on stdout any more."
    assert hint == "Check the program behind the pipe."


REFUSED: list[tuple[list[str], str]] = [
    ([], "There is no live source."),
    (["--input", "a.mp4", "--inputs", "."], "There are two live sources."),
    (["--input", "a.mp4"], "There is no character to animate."),
    (["--input", "a.mp4", "--reference", "c.png", "--mode", "replace"], "The mode replace needs masks"),
    (["--inputs", ".", "--size", "64x48"], "--inputs names clips that are prepared already"),
    (["--inputs", ".", "--hold", "0"], "0.0 frames per second cannot be held."),
    (["--inputs", ".", "-o", "http://example.com/x"], "Nothing can be sent to http://."),
    (["--inputs", ".", "-o", "rtmp://127.0.0.1/x", "--codec", "hevc"], "A stream is H.264 by the CPU"),
    (["--inputs", ".", "-o", "out.txt"], "out.txt ends in .txt"),
    (["--inputs", ".", "-o", "-", "--json"], "stdout cannot carry the video and the JSON lines."),
    (["--inputs", "."], "There is no src_ref.png"),
    (["--input", "missing.mp4", "--reference", "c.png"], "There is no file missing.mp4."),
    (["--input", "tcp://127.0.0.1:9", "--reference", "c.png"], "The stream tcp://127.0.0.1:9 cannot be"),
    (["--input", "/dev/video97", "--reference", "c.png"], "The camera /dev/video97 cannot be opened"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[says[:30] for _, says in REFUSED])
def test_bad_input_is_one_sentence(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made_up_people(monkeypatch)
    write_reference(tmp_path / "c.png")
    if "-o" not in arguments:
        arguments = [*arguments, "-o", "out.mp4"]
    result = run(*arguments, *TINY)
    said = result.stdout if "--json" in arguments else result.stderr
    assert result.exit_code in (1, 2) and says in said, said
    assert "Traceback" not in said and not (tmp_path / "out.mp4").exists()


def test_an_input_is_not_overwritten(folder: Path) -> None:
    pose = folder / "src_pose.mp4"
    before = pose.read_bytes()
    result = run("--inputs", folder, "-o", pose, "-y", *TINY)
    assert result.exit_code == 2 and "is an input of this job" in result.stderr
    assert pose.read_bytes() == before


def test_the_options_of_the_job_are_those_of_run(folder: Path, tmp_path: Path) -> None:
    """The same objects: a new option of `run` that is taken over needs no copy."""
    shared = {id(parameter) for parameter in cli.commands["run"].params}
    live = cli.commands["live"].params
    own = {parameter.name for parameter in live if id(parameter) not in shared}
    assert own == {"source", "inputs", "output", "pictures", "hold", "as_json", "quiet"}
    assert len(live) == len({parameter.name for parameter in live})


def test_without_a_pose_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the stream is opened."""
    monkeypatch.setattr(trt_wan.preprocess.stages, "_has_mediapipe", lambda: False)
    write_reference(tmp_path / "c.png")
    result = run(
        "--input", "tcp://127.0.0.1:9", "--reference", tmp_path / "c.png", "-o", tmp_path / "o.mp4", *TINY
    )
    assert result.exit_code == 2 and "There is nothing to find people with" in result.stderr


# --- live_on_gpu.py --------------------------------------------------------------------------------------

BY_HAND = ["--random", "--model", "tiny", "--size", "64x48", "--window", "13", "--steps", "1"]


def test_the_command_of_live_on_gpu(tmp_path: Path) -> None:
    """Its options are those of the command, and what is given after -- comes last."""
    asked = live_on_gpu.parsed([str(tmp_path), *BY_HAND, "--seconds", "1", "--", "--seed", "3"])
    made = live_on_gpu.command(asked, "")
    assert made[-2:] == ["--seed", "3"] and "--gpus" not in made
    cli.commands["live"].make_context("live", made[len(TRT_WAN) + 1 :])
    assert len(read_frames(tmp_path / "clips-64x48-16-16" / "src_pose.mp4")) == 16
    on_two = live_on_gpu.command(asked, "2")
    assert on_two[-4:-2] == ["--gpus", "2"]
    assert cli.commands["live"].make_context("live", on_two[len(TRT_WAN) + 1 :]).params["gpus"] == 2
    raw = live_on_gpu.command(live_on_gpu.parsed([str(tmp_path), *BY_HAND, "--raw", "--seconds", "1"]), "")
    cli.commands["live"].make_context("live", raw[len(TRT_WAN) + 1 :])


def test_live_on_gpu_tells_of_a_failure() -> None:
    failed = {"ok": False, "error": {"message": "The GPU is gone.", "hint": "Plug it in."}}
    with pytest.raises(RuntimeError, match="The GPU is gone. Plug it in."):
        live_on_gpu.line_of(json.dumps(failed))


@pytest.mark.long
def test_live_on_gpu_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert live_on_gpu.main([str(tmp_path), *BY_HAND, "--seconds", "3", "--", "--seed", "3"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["frames_in"] == 48 == line["frames_out"] + line["dropped"]
    assert line["holds"] > 0 and line["rate"] > 0 and line["latency_worst"] >= line["latency_median"] > 0
    assert line["windows"][-1]["frames_out"] == line["frames_out"]
