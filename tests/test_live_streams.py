"""Sources and outputs of live jobs: clips that are played, streams over loopback, and how they end."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from live_sender import free_port
from made_clips import write_clip
from test_live import SIZE, SOON, picture, told, until

from trt_wan.errors import InputError, OutputError, UsageError
from trt_wan.runtime.events import Event
from trt_wan.runtime.live import sources
from trt_wan.runtime.live.outputs import StreamOutput, muxer_of
from trt_wan.runtime.live.sources import FRAME, PlayedClip, Stream, open_live
from trt_wan.runtime.video.reader import Picture

TESTS = Path(__file__).parent


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
    url, told = url.format(free_port()), list[object]()
    with subprocess.Popen(
        [sys.executable, "-c", RECEIVER, url], stdout=subprocess.PIPE, text=True
    ) as receiver:
        output = _connected(url)
        for k in range(30):
            output.write(picture(8 * k)["pose"])
        output.settle(told.append)
        assert told == [None]
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
