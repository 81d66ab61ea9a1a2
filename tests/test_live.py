"""Live jobs with a made-up model: counts, latency, drops, every way to end, streams in and out.

The clock of most tests is made up too. The whole way with a network is in test_live_run.py.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from live_sender import free_port
from made_clips import write_clip
from tiny_job import read_frames

from trt_wan.errors import InputError, OutputError, Stopped, UsageError
from trt_wan.runtime.events import Event, LiveWindow, Note, Progress, WindowDone
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.live import intake as intake_module
from trt_wan.runtime.live import sources
from trt_wan.runtime.live.hold import Held, hold, measure, smaller
from trt_wan.runtime.live.intake import Intake
from trt_wan.runtime.live.live import ArrivingClips, Feed, Went, go_live
from trt_wan.runtime.live.outputs import StreamOutput, muxer_of
from trt_wan.runtime.live.sources import FRAME, PlayedClip, Stream, open_live
from trt_wan.runtime.step_cache import StepCache
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

    def settle(self) -> None:
        self.settled += 1

    def finish(self) -> None:
        self.finished = True

    def abandon(self, keep: bool) -> Path | None:
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
    last = output.levels[-1]
    assert len(output.levels) == last + 1, "as long as the source"
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

        def settle(self) -> None:
            writer.settle()
            super().settle()

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


# --- Sources ---------------------------------------------------------------------------------------------


class Delivered:
    """What a source delivers."""

    def __init__(self, most: int | None = None) -> None:
        self.times: list[float] = []
        self.pictures: list[Picture] = []
        self.why = ""
        self.error: BaseException | None = None
        self.done = threading.Event()

    def deliver(self, seconds: float, pictures: Callable[[], Any]) -> None:
        self.times.append(seconds)
        self.pictures.append(pictures()[FRAME])

    def ended(self, why: str, error: BaseException | None) -> None:
        self.why, self.error = why, error
        self.done.set()

    def of(self, source: Any, after: Callable[[], None] = lambda: None) -> "Delivered":
        source.start(self.deliver, self.ended)
        after()
        assert self.done.wait(SOON), "the source did not end"
        return self


def frame(k: int) -> dict[str, Picture]:
    return {FRAME: picture(k)["pose"]}


def test_a_clip_is_played_at_its_own_rate() -> None:
    source = PlayedClip(SIZE, 20, Fraction(40), frame)
    began = time.monotonic()
    made = Delivered().of(source)
    assert time.monotonic() - began >= 19 / 40
    assert made.times == pytest.approx([k / 40 for k in range(20)]) and made.why == "the clip has ended"
    assert [int(each[0, 0, 0]) for each in made.pictures] == list(range(20))


def test_a_clip_of_uneven_frames_keeps_their_times() -> None:
    times = np.array([0.0, 0.01, 0.2])
    assert Delivered().of(PlayedClip(SIZE, 3, Fraction(10), frame, times)).times == list(times)


def test_a_clip_that_is_stopped() -> None:
    source = PlayedClip(SIZE, 10_000, Fraction(1), frame)
    made = Delivered().of(source, source.close)
    assert made.why == "stopped" and len(made.times) <= 1


def test_a_clip_that_is_damaged_ends_there() -> None:
    def damaged(k: int) -> dict[str, Picture]:
        if k == 3:
            raise InputError("clip.mp4 is damaged.", "Copy it again.")
        return frame(k)

    made = Delivered().of(PlayedClip(SIZE, 9, Fraction(100), damaged))
    assert made.why == "clip.mp4 is damaged" and made.error is None and len(made.pictures) == 3


def test_a_mistake_in_a_source_is_no_silent_end() -> None:
    def wrong(k: int) -> dict[str, Picture]:
        raise RuntimeError("a mistake")

    assert isinstance(Delivered().of(PlayedClip(SIZE, 9, Fraction(100), wrong)).error, RuntimeError)


@dataclass
class Camera:
    """Opens `clips` one after the other, as a stream that is lost after each; None cannot be opened."""

    clips: list[Path | None]

    def __call__(self, name: str) -> Any:
        clip = self.clips.pop(0) if self.clips else None
        if clip is None:
            raise InputError(f"The stream {name} cannot be opened (refused).", "Check it.")
        return av.open(str(clip))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "c.mkv", 9)


def told(events: list[Event], code: str) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and event.code == code]


def test_rtsp_is_opened_again_a_few_times(clip: Path) -> None:
    """Twice found at once or on the second attempt, then not any more. Time goes on."""
    events: list[Event] = []
    camera = Camera([clip, clip, None, clip])
    stream = Stream("rtsp://camera/x", events.append, camera, pauses=(0.2, 0.05, 0.05))
    until(lambda: len(camera.clips) == 0)
    made = Delivered().of(stream)
    lost = told(events, "stream_lost")
    assert [text.rpartition("(")[2] for text in lost] == [
        *("1 of 3).", "1 of 3).", "2 of 3)."),
        *("1 of 3).", "2 of 3).", "3 of 3)."),
    ]
    assert len(told(events, "stream_found")) == 2 and "rtsp://camera/x has ended" in lost[0]
    assert made.why == "rtsp://camera/x has ended" and made.error is None


def test_time_goes_on_after_a_stream_was_lost(clip: Path) -> None:
    """Each connection begins at the time at which it came, whatever its own clock says."""
    now = [100.0]
    camera = Camera([clip, clip])
    gate = threading.Event()

    def opened(name: str) -> Any:
        if len(camera.clips) == 1:
            now[0] += 7
        return camera(name)

    class Gated(Stream):
        """Reads nothing before the start, so that no frame is left out."""

        def _read(self, frames: Any) -> str:
            assert gate.wait(SOON)
            return super()._read(frames)

        def _first(self, container: Any) -> Any:
            """The second connection's own clock goes on, half a second after the first's last frame."""
            first, others = super()._first(container)
            is_later = not camera.clips
            return _later(first, is_later), (_later(each, is_later) for each in others)

    stream = Gated("rtsp://camera/x", open_stream=opened, pauses=(0.01,), clock=lambda: now[0])
    made = Delivered().of(stream, gate.set)
    spacing = np.diff(made.times)
    assert made.times[0] == 0 and len(made.times) == 18
    assert (
        spacing.max() == pytest.approx(7 - 8 / 12, abs=0.01) and np.isclose(spacing, 1 / 12, 1e-2).sum() == 16
    )


def _later(frame: av.VideoFrame, is_later: bool) -> av.VideoFrame:
    if is_later:
        frame.pts += round(Fraction(14, 12) / frame.time_base)
    return frame


def test_other_streams_are_not_opened_again(clip: Path) -> None:
    camera = Camera([clip, clip])
    stream = Stream("tcp://127.0.0.1:1", open_stream=camera)
    made = Delivered().of(stream)
    assert made.why == "tcp://127.0.0.1:1 has ended" and len(camera.clips) == 1


def test_a_stream_that_changes_its_size_ends(clip: Path, tmp_path: Path) -> None:
    other = write_clip(tmp_path / "d.mkv", 5, size=(160, 96))
    stream = Stream("rtsp://camera/x", open_stream=Camera([clip, other]), pauses=(0.2,))
    assert Delivered().of(stream).why == "rtsp://camera/x has changed from 320x180 to 160x96"


@pytest.mark.parametrize(
    "name", ["tcp://127.0.0.1:9", "rtsp://127.0.0.1:9/x", "/dev/video97", "nonsense://x"]
)
def test_a_source_that_cannot_be_opened(name: str) -> None:
    with pytest.raises(InputError, match=r"^The (stream|camera) .* cannot be opened \(.*\)\.$") as caught:
        Stream(name)
    assert "Check" in caught.value.hint


def test_passwords_are_not_told(clip: Path) -> None:
    url, opened, events = "rtsp://me:secret@camera:554/x?y=a@b", list[str](), list[Event]()
    camera = Camera([clip])

    def open_one(name: str) -> Any:
        opened.append(name)
        return camera(name)

    made = Delivered().of(Stream(url, events.append, open_one, pauses=(0.01,)))
    assert opened == [url, url] and made.why == "rtsp://camera:554/x?y=a@b has ended"
    assert "secret" not in str(events)
    for name in ("rtsp://me:secret@127.0.0.1:9/x", "tcp://me:secret@127.0.0.1:9"):
        with pytest.raises(InputError) as caught:
            Stream(name)
        assert "secret" not in str(caught.value) and "127.0.0.1:9" in caught.value.message
    with pytest.raises(OutputError) as failed:
        StreamOutput("rtmp://me:secret@127.0.0.1:9/live", *SIZE, Fraction(12))
    assert "secret" not in failed.value.message


@pytest.mark.parametrize("scheme", ["tcp", "udp", "rtsp"])
def test_a_stream_over_loopback(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A camera in another process: MPEG-TS over TCP and UDP, and RTSP, with us as the server."""
    monkeypatch.setattr(sources, "SILENCE", 2.0)
    where = f"{scheme}://127.0.0.1:{free_port()}"
    url = where + ("/x" if scheme == "rtsp" else "")
    sender = subprocess.Popen(
        [sys.executable, str(TESTS / "live_sender.py"), url, "3"], stdout=subprocess.PIPE, text=True
    )
    listens = {"rtsp_flags": "listen", "listen_timeout": "30"} if scheme == "rtsp" else {}
    heard = f"{url}?listen=1" if scheme == "tcp" else url
    if scheme == "udp":
        monkeypatch.setattr(sources, "OPENING", 60.0)
    stream = Stream(heard, open_stream=partial(open_live, options=listens), pauses=())
    made = Delivered().of(stream)
    assert (stream.width, stream.height, stream.rate) == (320, 180, 15)
    assert "ended" in made.why or "lost" in made.why
    assert int(sender.communicate(timeout=SOON)[0]) == 45
    assert 5 < len(made.pictures) <= 45, "the first ones came before the start"
    assert np.allclose(np.diff(made.times), 1 / 15, atol=0.01)
    levels = np.array([int(each.mean()) for each in made.pictures])
    assert np.allclose(np.diff(levels), 4, atol=3) and abs(levels[-1] - 4 * 44) <= 4


# --- Outputs ---------------------------------------------------------------------------------------------

RECEIVER = """
import sys, av
def levels():
    with av.open(sys.argv[1], options={"listen": "1"}, timeout=30) as container:
        for frame in container.decode(video=0):
            yield str(int(frame.to_ndarray(format="rgb24").mean()))
try:
    for level in levels():
        print(level)
except OSError:
    pass  # RTMP ends so
"""


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:{}", "rtmp://127.0.0.1:{}/live/key"])
def test_a_stream_goes_out(url: str) -> None:
    url = url.format(free_port())
    with subprocess.Popen(
        [sys.executable, "-c", RECEIVER, url], stdout=subprocess.PIPE, text=True
    ) as receiver:
        output = _connected(url)
        for k in range(30):
            output.write(picture(8 * k)["pose"])
        output.settle()
        output.finish()
        levels = [int(level) for level in receiver.communicate(timeout=SOON)[0].split()]
    assert len(levels) == 30 and np.allclose(levels, [8 * k for k in range(30)], atol=4)


def _connected(url: str) -> StreamOutput:
    end = time.monotonic() + SOON
    while True:
        try:
            return StreamOutput(url, *SIZE, Fraction(12))
        except OutputError as error:
            assert "cannot be opened (Connection refused)" in error.message and time.monotonic() < end
            time.sleep(0.1)


def test_a_receiver_that_goes_away_is_told() -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    receiver = subprocess.Popen([sys.executable, "-c", RECEIVER, url], stdout=subprocess.PIPE, text=True)
    output = _connected(url)
    receiver.kill()
    receiver.communicate()
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    with pytest.raises(OutputError, match="is lost"):
        for _ in range(1000):
            output.write(noise)
    assert output.abandon(keep=True) is None


def test_urls_that_nothing_can_be_sent_to() -> None:
    with pytest.raises(UsageError, match="Nothing can be sent to https://"):
        muxer_of("https://example.com/x")


# --- The rate that is held -------------------------------------------------------------------------------


def of_size(pixels_per_second: float, fixed: float = 0.2) -> Callable[[Job, tuple[int, int]], Held]:
    """A machine that has `fixed` seconds a window outside the steps, in which time goes by pixels."""

    def measured(job: Job, size: tuple[int, int]) -> Held:
        steps = job.steps * size[0] * size[1] / pixels_per_second
        return Held(fixed + steps, steps, sum(job.computed))

    return measured


def held(wanted: float | None, speed: float) -> tuple[int, tuple[int, int], list[str]]:
    events: list[Event] = []
    job, size, made = hold(JOB, (832, 480), wanted, of_size(speed), events.append)
    if wanted is not None and not told(events, "not_held"):
        assert made.rate(job) >= wanted
    return job.steps, size, [event.text for event in events if isinstance(event, Note)]


def test_what_is_held_is_told() -> None:
    """0.2 s and four steps of 0.4 s for 12 new frames."""
    steps, size, notes = held(None, 832 * 480 / 0.4)
    assert (steps, size) == (4, (832, 480))
    assert notes == ["832x480 with 4 steps holds 6.7 frames per second (1.80 s a window of 13)."]


def test_steps_are_lowered_first() -> None:
    """Three steps take 1.4 s for 12 frames."""
    steps, size, notes = held(8, 832 * 480 / 0.4)
    assert (steps, size) == (3, (832, 480))
    assert "To hold 8 frames per second, 4 steps are lowered to 3." in notes
    assert notes[-1] == "832x480 with 3 steps holds 8.6 frames per second (1.40 s a window of 13)."


def test_then_the_size_is_lowered() -> None:
    steps, size, notes = held(16, 832 * 480 / 0.4)
    assert steps == 2 and size[0] < 832 and size[1] < 480 and not size[0] % 16 and not size[1] % 16
    assert abs(size[0] / size[1] - 832 / 480) < 0.2
    assert any(text.startswith("To hold 16 frames per second, 4 steps are lowered to 2.") for text in notes)
    assert any(text.startswith("To hold 16 frames per second, 832x480 is lowered to") for text in notes)


def test_what_cannot_be_held_is_told() -> None:
    steps, size, notes = held(200, 832 * 480 / 0.4)
    assert steps == 2 and min(size) >= 128
    assert any(text.startswith("200 frames per second cannot be held: ") for text in notes)


def test_chosen_noise_levels_and_the_steps_of_a_cache_stay() -> None:
    cached = replace(JOB, steps=20, step_cache=StepCache(0.0))
    for job in (replace(JOB, sigmas=(1.0, 0.5, 0.0)), cached):
        made, size, _ = hold(job, (832, 480), 16, of_size(832 * 480 / 0.4))
        assert made is job and size != (832, 480)


def test_sizes_become_smaller_until_there_is_none() -> None:
    size: Any = (832, 480)
    seen = [size]
    while (size := smaller(size, 0.99)) is not None:
        assert size[0] < seen[-1][0] or size[1] < seen[-1][1]
        seen.append(size)
    assert len(seen) > 5 and min(seen[-1]) < 160


def test_the_second_window_is_measured() -> None:
    class Model:
        def pieces(self, job: Job, *, clips: Clips, progress: Progress, should_stop: Any, **_: Any) -> Any:
            assert clips.frames == 2 * WINDOW - OVERLAP and clips.pose is not None and clips.face is None
            assert not clips.pose.window([clips.frames - 1]).any()
            for j in range(2):
                if should_stop():
                    raise Stopped("Stopped.")
                time.sleep(0.2 if j == 0 else 0.05)
                yield np.zeros((3, 4, 48, 64), np.float32)
                progress(WindowDone(j + 1, 2, 12))

    reference = np.zeros((48, 64, 3), np.uint8)
    assert 0.05 <= measure(JOB, Model(), reference, SIZE).window < 0.2
    with pytest.raises(Stopped):
        measure(JOB, Model(), reference, SIZE, should_stop=lambda: True)


def test_prepared_clips_are_scaled_to_a_lower_size() -> None:
    """Faces stay as they are."""
    intake = Intake(Fraction(10), WINDOW, OVERLAP)
    face = np.full((512, 512, 3), 9, np.uint8)
    pose = cv2.circle(np.zeros((96, 128, 3), np.uint8), (64, 48), 30, (255, 255, 255), -1)
    source = PlayedClip((128, 96), 1, Fraction(10), lambda k: {"pose": pose, "face": face})
    Feed(intake, SIZE).start(source)
    until(lambda: intake.why_ended is not None)
    (frame,) = intake.take(1)
    assert frame.pictures["face"] is face and frame.pictures["pose"].shape == (48, 64, 3)
    assert abs(float(frame.pictures["pose"].mean()) - float(pose.mean())) < 2
