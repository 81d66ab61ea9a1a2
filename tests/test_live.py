"""Live jobs with a made-up model: counts, latency, drops, every way to end, by a made-up clock.

Sources and outputs are in test_live_streams.py, the whole way with a network in test_live_run.py.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_job import read_frames

from trt_wan.errors import InputError, OutputError, Stopped
from trt_wan.runtime.events import Event, LiveWindow, Note, Progress, WindowDone
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.live import intake as intake_module
from trt_wan.runtime.live.intake import Intake
from trt_wan.runtime.live.live import ArrivingClips, Feed, Went, go_live
from trt_wan.runtime.video.clips import Clips
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.writer import VideoWriter

TESTS = Path(__file__).parent
SIZE = 64, 48
WINDOW, OVERLAP, STRIDE = 13, 1, 12
SOON = 30  # seconds after which a test that waits has failed
JOB = Job(Inputs(Path("character.png"), Path("pose.mp4"), None), window=WINDOW, steps=4)


@dataclass
class Clock:
    """A made-up clock, and a source of grey pictures: picture k is k mod 256."""

    rate: int
    frames: int
    now: float = 0.0
    width: int = SIZE[0]
    height: int = SIZE[1]
    sent: int = 0
    stopped: bool = False
    why: str = "the clip has ended"
    deliver: Any = None

    def __call__(self) -> float:
        return self.now

    def start(self, deliver: Any, ended: Any) -> None:
        self.deliver, self.ended, self.began = deliver, ended, self.now

    def stop(self) -> None:
        self.stopped = True

    def advance(self, seconds: float) -> None:
        """Frames that are due come meanwhile."""
        until = self.now + seconds
        while not self.stopped and self.sent < self.frames:
            due = self.began + self.sent / self.rate
            if due > until + 1e-9:
                break
            self.now = max(self.now, due)
            self.deliver(self.sent / self.rate, partial(picture, self.sent))
            self.sent += 1
        self.now = until
        if self.stopped or self.sent >= self.frames:
            self.ended("stopped" if self.stopped else self.why, None)


def picture(k: int) -> dict[str, Picture]:
    return {"pose": np.full((SIZE[1], SIZE[0], 3), k % 256, np.uint8)}


class Output:
    """Keeps the level of every picture."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.levels: list[int] = []
        self.fails_at, self.settled, self.finished, self.abandoned = fails_at, 0, False, False

    def write(self, frame: Picture) -> None:
        if len(self.levels) == self.fails_at:
            raise OutputError("The disk is full.", "Free some space.")
        self.levels.append(int(frame[0, 0, 0]))

    def settle(self, then: Callable[[Any], object]) -> None:
        self.settled += 1
        then(None)

    def check(self) -> None:
        pass

    def finish(self) -> None:
        self.finished = True

    def abandon(self, keep: bool, at_once: bool = False) -> Path | None:
        self.abandoned = True
        return None


@dataclass
class Repeats:
    """A model that gives back its pose clip, and whose windows take `seconds` of the clock."""

    clock: Clock
    output: Output
    seconds: float
    seen: list[list[int]] = field(default_factory=list)  # pose levels, by window

    def pieces(self, job: Job, *, clips: Clips, progress: Progress, **_: Any) -> Iterator[Array]:
        windows, j = job.windows(clips.frames), 0
        while True:
            clips = clips.until(windows.end(j))
            windows = job.windows(clips.frames)
            if j >= windows.total:
                return
            assert clips.pose is not None
            pose, kept = clips.pose.window(windows.indices(j)), windows.keep(j)
            self.seen.append([int(frame[0, 0, 0]) for frame in pose])
            self.clock.advance(self.seconds)
            yield (pose[kept].transpose(3, 0, 1, 2) / np.float32(127.5) - 1).astype(np.float32)
            progress(WindowDone(j + 1, windows.total, kept.stop - kept.start))
            j += 1
            until(lambda j=j: self.output.settled >= j or self.output.fails_at is not None)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.001)


def told(events: list[Event], code: str) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and event.code == code]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "POLL", 0.001)


def run(
    clock: Clock,
    seconds: float,
    output: Any = None,
    stop_at: float | None = None,
    events: list[Event] | None = None,
    guess: float | None = None,
    model: Repeats | None = None,
) -> tuple[Went, Any, Repeats]:
    """`stop_at`: the time of Ctrl-C."""
    output = output or Output()
    model = model or Repeats(clock, output, seconds)
    intake = Intake(Fraction(clock.rate), WINDOW, OVERLAP, guess, clock=clock)
    clips = ArrivingClips(JOB, np.zeros((48, 64, 3), np.uint8), SIZE, ("pose",), intake)

    end = time.monotonic() + SOON

    def should_stop() -> bool:
        assert time.monotonic() < end, "it did not end"
        if intake.lacking:
            clock.advance(1 / clock.rate)
        return stop_at is not None and clock.now >= stop_at

    told = (events if events is not None else []).append
    went = go_live(JOB, model, clips, clock, Feed(intake), output, told, should_stop)
    return went, output, model


def test_every_frame_in_order() -> None:
    """The windows are those of a finite clip, the last one filled up by walking back."""
    events: list[Event] = []
    went, output, model = run(Clock(16, 40), 0.5, events=events)
    assert (went.frames_in, went.frames_out, went.dropped, went.windows) == (40, 40, 0, 4)
    assert output.levels == list(range(40)) and output.finished and not output.abandoned
    windows = JOB.windows(40)
    assert model.seen == [windows.indices(j) for j in range(windows.total)]
    told = [event for event in events if isinstance(event, LiveWindow)]
    assert [each.window for each in told] == [1, 2, 3, 4] and told[-1].frames_out == 40
    assert [each.frames_out for each in told] == [13, 25, 37, 40]


def test_latency_is_from_arrival_to_writing() -> None:
    """The first frame of window 1 waits for 12 others, at 16 a second, and for the model."""
    went, _, _ = run(Clock(16, 37), 0.5)
    assert went.latency_worst == pytest.approx(12 / 16 + 0.5, abs=0.01)
    assert 0.5 <= went.latency_median <= went.latency_worst


def test_a_slow_model_drops_evenly_and_keeps_time() -> None:
    """Half of the frames at twice the time. The output has the source's rate: each is shown twice."""
    went, output, _ = run(Clock(16, 200), 1.5, guess=1.5)
    assert went.frames_in == 200 and went.frames_in == went.frames_out + went.dropped
    assert 90 <= went.frames_out <= 112
    assert went.latency_worst < 2.3 * 1.5
    assert output.levels[-1] < 199 and len(output.levels) == 200, "as long as the source"
    assert all(0 <= k - level <= 2 for k, level in enumerate(output.levels)), "every picture at its time"


def test_ctrl_c_finishes_what_came() -> None:
    """In the second window; the frames that have come by then are a third one."""
    went, output, _ = run(Clock(16, 10_000), 0.5, stop_at=1.8)
    assert went.ended == "stopped" and output.finished and not output.abandoned
    assert output.levels == list(range(went.frames_in)) and went.frames_out == went.frames_in
    assert 25 < went.frames_in <= 40


def test_the_source_starts_when_the_model_is_ready() -> None:
    """Seconds in which the prompt is encoded cost no frame; Ctrl-C in them ends it."""

    class Late(Repeats):
        def pieces(self, job: Job, *, clips: Clips, progress: Progress, **options: Any) -> Iterator[Array]:
            assert self.clock.deliver is None
            self.clock.now += 60
            progress(Note("The prompt is encoded."))
            yield from super().pieces(job, clips=clips, progress=progress, **options)

    clock, output = Clock(16, 40), Output()
    went, _, _ = run(clock, 0.5, output, model=Late(clock, output, 0.5))
    assert (went.frames_in, went.frames_out, went.dropped) == (40, 40, 0) and went.latency_worst < 2
    clock, output = Clock(16, 40), Output()
    with pytest.raises(Stopped, match="before the first frame"):
        run(clock, 0.5, output, stop_at=30, model=Late(clock, output, 0.5))
    assert output.abandoned and not output.levels


def test_ctrl_c_does_not_wait_for_a_silent_camera() -> None:
    class Silent(Clock):
        """Its thread waits for a picture and does not hear that it shall stop."""

        def advance(self, seconds: float) -> None:
            if not self.stopped:
                super().advance(seconds)

    went, output, _ = run(Silent(16, 10_000), 0.5, stop_at=1.8)
    assert went.ended == "stopped" and output.finished and went.frames_out == went.frames_in


def test_a_file_is_finished_and_plays(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "out.mp4", *SIZE, Fraction(16))

    class Both(Output):
        def write(self, frame: Picture) -> None:
            super().write(frame)
            writer.write(frame)

        def settle(self, then: Callable[[Any], object]) -> None:
            writer.settle(then)
            self.settled += 1

        def finish(self) -> None:
            writer.finish()

    run(Clock(16, 10_000), 0.5, Both(), stop_at=1.8)
    frames = read_frames(tmp_path / "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    levels = [float(frame.mean()) for frame in frames]
    assert 25 < len(levels) <= 40 and np.allclose(levels, range(len(levels)), atol=3)


def test_a_source_without_a_frame_is_told() -> None:
    clock = Clock(16, 0, why="rtsp://camera is lost (nothing comes)")
    with pytest.raises(InputError, match="No frame came") as caught:
        run(clock, 0.5)
    assert "rtsp://camera is lost" in caught.value.hint


def test_the_end_of_the_source_is_told() -> None:
    events: list[Event] = []
    went, output, _ = run(Clock(16, 20, why="rtsp://camera is lost (nothing comes)"), 0.5, events=events)
    notes = [event for event in events if isinstance(event, Note)]
    assert notes[-1].code == "live_ended" and "is lost (nothing comes)" in notes[-1].text
    assert went.frames_out == 20 and output.finished


def test_a_full_disk_ends_it() -> None:
    clock, output = Clock(16, 1000), Output(fails_at=20)
    with pytest.raises(OutputError, match="The disk is full"):
        run(clock, 0.5, output)
    assert clock.stopped and output.abandoned and not output.finished
