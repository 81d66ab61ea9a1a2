"""A job to its file, the network's part made up: what is written while frames are decoded, and what is left
of a job that fails. The whole way with a network is in test_cli.py.
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from filelock import FileLock
from tiny_job import FRAMES, PLAN, prepare, read_frames, write_sound

from trt_wan.errors import OutputError, Stopped, UsageError
from trt_wan.runtime import render as module
from trt_wan.runtime.events import Event, Note, Progress, StageStarted, WindowDone
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.paste_back import SOFT_EDGE
from trt_wan.runtime.pipeline import ShouldStop, to_pixels
from trt_wan.runtime.render import render
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.working_file import WorkingFile
from trt_wan.runtime.video.writer import VideoWriter

SOON = 20  # seconds after which a test that waits has failed
PIECES = [1, 4, 4, 4, 4, 3]
Make = Callable[..., Iterator[Array]]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return prepare(folder, write_sound(folder / "tone.m4a", 1))


def job(clips: Path, mode: Any = "animate") -> Job:
    return Job(Inputs.from_folder(clips, mode), mode=mode, window=PLAN.frames)


def pieces() -> list[Array]:
    """A grey that gets lighter, by 10 levels a frame."""
    levels = np.arange(FRAMES, dtype=np.float32) * 10 / 127.5 - 1
    frames = np.broadcast_to(levels[None, :, None, None], (3, FRAMES, PLAN.height, PLAN.width))
    return np.split(np.ascontiguousarray(frames), np.cumsum(PIECES)[:-1], axis=1)


class Decoding:
    """An open model whose pieces are made up."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def pieces(self, job: Job, **options: Any) -> Iterator[Array]:
        return self.make(**options)


def on_write(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """`act` before every frame is written, with its number."""
    write = VideoWriter.write

    def acting(writer: VideoWriter, frame: Picture) -> None:
        act(writer.frames)
        write(writer, frame)

    monkeypatch.setattr(VideoWriter, "write", acting)


def greys(path: Path) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in read_frames(path)]


def test_the_next_piece_is_decoded_while_one_is_written(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    """The first frame is not written before the last but one piece is decoded, and no piece after that before
    the first frame is under way: one after the other, neither would come.
    """
    under_way, decoded = threading.Event(), threading.Event()

    def make(**options: Any) -> Iterator[Array]:
        for k, piece in enumerate(pieces()):
            if k == len(PIECES) - 1:
                assert under_way.wait(SOON), "nothing is written while frames are decoded"
                decoded.set()
            yield piece

    def hold(frame: int) -> None:
        under_way.set()
        assert decoded.wait(SOON), "nothing is decoded while frames are written"

    model = Decoding(make)
    on_write(monkeypatch, hold)
    events: list[Event] = []
    made = render(job(clips), model, tmp_path / "out.mp4", progress=events.append)
    assert greys(made.path) == list(range(FRAMES)) and made.frames == FRAMES
    assert made.writing_seconds > 0 and events == [StageStarted("write")]
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with Clip(made.path) as clip:
        assert clip.has_sound


def test_what_is_decoded_ahead_is_bounded(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "ROOM", 2)
    taken, ahead = 0, []

    def make(**options: Any) -> Iterator[Array]:
        nonlocal taken
        for piece in pieces():
            yield piece
            taken += 1

    def slow(frame: int) -> None:
        time.sleep(0.02)
        ahead.append(taken - int(np.searchsorted(np.cumsum(PIECES), frame, side="right")))

    model = Decoding(make)
    on_write(monkeypatch, slow)
    assert greys(render(job(clips), model, tmp_path / "out.mp4").path) == list(range(FRAMES))
    assert max(ahead) <= 3, "one in use and two that wait"


def full(frame: int) -> None:
    if frame == 3:
        raise OutputError("The disk is full.", "Free some space.")


def test_a_writer_that_fails_ends_the_job_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    """The pipeline asks between steps whether to stop: no other piece comes before the error is reported."""

    def make(should_stop: Callable[[], bool], **options: Any) -> Iterator[Array]:
        yield from pieces()[:2]
        end = time.monotonic() + SOON
        while time.monotonic() < end:
            assert not should_stop()
            time.sleep(0.001)
        pytest.fail("the job went on")

    model = Decoding(make)
    on_write(monkeypatch, full)
    with pytest.raises(OutputError) as caught:
        render(job(clips), model, tmp_path / "out.mp4")
    partial = tmp_path / "out.partial.mp4"
    assert caught.value.message == "The disk is full."
    assert caught.value.hint == f"Free some space.\nThe 3 finished frames are in {partial}."
    assert greys(partial) == [0, 1, 2] and list(tmp_path.iterdir()) == [partial]


def test_a_full_disk_ends_the_job_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    """It is the window's thread that finds it full, and no frame comes after."""

    def make(progress: Progress, should_stop: ShouldStop, **options: Any) -> Iterator[Array]:
        yield from pieces()[:2]
        progress(WindowDone(1, 2, 5))
        end = time.monotonic() + SOON
        while time.monotonic() < end:
            assert not should_stop()
            time.sleep(0.001)
        pytest.fail("the job went on")

    def no_room(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WorkingFile, "append", no_room)
    with pytest.raises(OutputError, match="The disk is full"):
        render(job(clips), Decoding(make), tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("paste_back", [False, True])
def test_a_window_is_finished_when_its_frames_are_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path, paste_back: bool
) -> None:
    """The writer is slow here. The event comes in the caller's thread, between later ones."""
    there, first = [], sum(PIECES[:4])

    def make(progress: Progress, should_stop: ShouldStop, **options: Any) -> Iterator[Array]:
        yield from pieces()[:4]
        progress(WindowDone(1, 2, first))
        for _ in range(10):
            time.sleep(0.05)
            assert not should_stop()
        yield from pieces()[4:]
        progress(WindowDone(2, 2, FRAMES - first))

    def tell(event: Event) -> None:
        if isinstance(event, WindowDone):
            partial, finished = tmp_path / "out.partial.mp4", tmp_path / "out.mp4"
            file = finished if finished.exists() else partial
            there.append((event.window, file.name, len(read_by_pyav(file)), threading.current_thread().name))

    model = Decoding(make)
    on_write(monkeypatch, lambda frame: time.sleep(0.005))
    mode = "replace" if paste_back else "animate"
    render(job(clips, mode), model, tmp_path / "out.mp4", paste_back=paste_back, progress=tell)
    main = threading.main_thread().name
    assert there == [(1, "out.partial.mp4", first, main), (2, "out.mp4", FRAMES, main)]


def read_by_pyav(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def test_an_output_that_another_process_writes_is_refused(clips: Path, tmp_path: Path) -> None:
    lock = FileLock(tmp_path / ".out.mp4.lock")
    model = Decoding(lambda **options: iter(pieces()))
    with lock, pytest.raises(OutputError, match="Another run is writing"):
        render(job(clips), model, tmp_path / "out.mp4")
    assert render(job(clips), model, tmp_path / "out.mp4").frames == FRAMES


@pytest.mark.parametrize("last", [2, len(PIECES)])
def test_a_writer_that_fails_at_the_end_is_reported_too(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path, last: int
) -> None:
    model = Decoding(lambda **options: iter(pieces()[:last]))
    on_write(monkeypatch, full)
    with pytest.raises(OutputError, match="disk is full"):
        render(job(clips), model, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists() and greys(tmp_path / "out.partial.mp4") == [0, 1, 2]


@pytest.mark.parametrize("error", [Stopped("Stopped in window 2."), RuntimeError("the GPU is gone")])
def test_a_job_that_fails_keeps_every_decoded_frame(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path, error: Exception
) -> None:
    """Those that were waiting to be written as well."""

    def make(**options: Any) -> Iterator[Array]:
        yield from pieces()[:4]
        raise error

    model = Decoding(make)
    on_write(monkeypatch, lambda frame: time.sleep(0.02))
    with pytest.raises(type(error)) as caught:
        render(job(clips), model, tmp_path / "out.mp4")
    where = f"The 13 finished frames are in {tmp_path / 'out.partial.mp4'}."
    assert where in (caught.value.hint if isinstance(caught.value, Stopped) else caught.value.__notes__)
    assert greys(tmp_path / "out.partial.mp4") == list(range(13))


def test_pasting_back_happens_beside_decoding_too(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    threads = set()
    paste = module.pasted_back

    def pasting(*arguments: Any) -> Iterator[Picture]:
        for frame in paste(*arguments):
            threads.add(threading.current_thread().name)
            yield frame

    monkeypatch.setattr(module, "pasted_back", pasting)
    model = Decoding(lambda **options: iter(pieces()))
    made = render(job(clips, "replace"), model, tmp_path / "out.mp4", paste_back=True)
    assert threads == {"beside"} and made.frames == FRAMES
    with Clip(clips / "src_mask.mp4") as mask, Clip(clips / "src_bg.mp4") as background:
        for k, frame in enumerate(read_frames(made.path)):
            painted = mask.window([k])[0, ..., 0] > 127
            assert abs(float(frame[painted].mean()) - 10 * k) < 6
            away = cv2.distanceTransform((~painted).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            kept = away > SOFT_EDGE + 1
            assert kept.any() and np.abs(frame.astype(int) - background.window([k])[0])[kept].mean() < 6


def test_rounding_is_numpys() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (3, 5, 48, 64)).astype(np.float32)
    values[:, 0, 0] = (np.arange(64, dtype=np.float32) + 0.5) / 127.5 - 1  # halves
    values[:, 0, 1, :2] = -1, 1
    expected = np.rint((values + np.float32(1)) * np.float32(127.5)).astype(np.uint8).transpose(1, 2, 3, 0)
    pixels = to_pixels(values[:, ::-1])
    assert pixels.flags.c_contiguous and np.array_equal(pixels, expected[::-1])


def test_a_gif_has_no_sound_and_says_so(clips: Path, tmp_path: Path) -> None:
    model, told = Decoding(lambda **options: iter(pieces())), list[Event]()
    made = render(job(clips), model, tmp_path / "out.gif", progress=told.append)
    assert [event.code for event in told if isinstance(event, Note)] == ["no_sound"]
    assert made.frames == FRAMES and greys(made.path) == list(range(FRAMES))
    with pytest.raises(UsageError, match="has no sound"):
        render(job(clips), model, tmp_path / "other.gif", sound=clips / "src_pose.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gif"]


@pytest.mark.parametrize("stopped", [False, True])
def test_frames_are_written_as_pictures_too(clips: Path, tmp_path: Path, stopped: bool) -> None:
    """All at once when all are there; those of a stopped job stay in another folder, which is named."""

    def make(**options: Any) -> Iterator[Array]:
        yield from pieces()[:4]
        if stopped:
            raise Stopped("Stopped in window 2.")
        yield from pieces()[4:]

    with pytest.raises(Stopped) if stopped else nullcontext() as caught:
        render(job(clips), Decoding(make), tmp_path / "out.mp4", frames=tmp_path / "png")
    folder = tmp_path / ("png.partial" if stopped else "png")
    pictures = [read_picture(path) for path in sorted(folder.iterdir())]
    assert [round(float(p.mean()) / 10) for p in pictures] == list(range(13 if stopped else FRAMES))
    assert {path.name for path in tmp_path.iterdir()} == (
        {"out.partial.mp4", "png.partial"} if stopped else {"out.mp4", "png"}
    )
    assert not stopped or str(folder) in caught.value.hint
