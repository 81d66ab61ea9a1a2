"""Parts of a video, encoded side by side: the files of parts encoded one after another, whichever encoder is
slow or fails, with all earlier frames and none after a gap.
"""

import errno
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from encoders import on_encode
from lengths import make_sound
from tiny_job import read_frames
from waits import SOON, until, waited

from trt_wan.errors import OutputError
from trt_wan.runtime.video import writer as module
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.part import PARTS, WAITING
from trt_wan.runtime.video.working_file import Settled, WorkingFile
from trt_wan.runtime.video.writer import VideoWriter

SIZE, RATE = (64, 48), Fraction(25)
ENDS = (13, 25, 37, 40)  # of the parts
FRAMES = np.random.default_rng(0).integers(0, 256, (40, SIZE[1], SIZE[0], 3), np.uint8)


def threads() -> int:
    return sum(thread.name == "beside" for thread in threading.enumerate())


def written(path: Path, one_by_one: bool, told: Callable[[Settled], object], **options: Any) -> bytes:
    with VideoWriter(path, *SIZE, RATE, **options) as writer:
        for number, frame in enumerate(FRAMES, 1):
            writer.write(frame)
            if number in ENDS:
                writer.settle(told)
                if one_by_one:
                    writer.wait()
        return writer.finish().read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
@pytest.mark.parametrize("heard", [False, True])
def test_a_slow_part_changes_no_byte(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str, heard: bool
) -> None:
    """The first part ends after the second has given all packets. All ends of parts are equal too."""
    sound = make_sound(tmp_path / "sound.mkv", 2, "aac") if heard else None
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected, ends, order, there = (
        list[Settled](),
        list[Settled](),
        list[tuple[int, int | None]](),
        list[int](),
    )
    name, second = f"out{suffix}", threading.Event()
    one = written(tmp_path / "one" / name, True, expected.append, sound=sound)

    def act(part: int, picture: int | None) -> None:
        if (part, picture) == (0, 12):
            waited(second)
        order.append((part, picture))
        if part == 1 and picture is None:
            second.set()

    def told(end: Settled) -> None:
        ends.append(end)
        if suffix not in (".webm", ".gif"):
            there.append(len(read_frames(tmp_path / "two" / f"out.partial{suffix}")))

    on_encode(monkeypatch, act)
    assert written(tmp_path / "two" / name, False, told, sound=sound) == one
    assert ends == expected and [end.pictures for end in ends] == [*ENDS]
    assert order.index((1, None)) < order.index((0, 12)) < order.index((2, 25))
    assert not there or there == [*ENDS], "a part plays when it is told of, and nothing after it is there"
    assert threads() == 0


def test_packets_are_those_of_a_lone_encoder(tmp_path: Path) -> None:
    """VP9's, which a muxer does not change."""
    written(tmp_path / "out.webm", False, lambda end: None)
    with av.open(str(tmp_path / "out.webm")) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    encoding = Quality().encoding(module.KINDS[".webm"], *SIZE, RATE)
    scaler, lone = module.VideoReformatter(), []
    for start, stop in zip((0, *ENDS), ENDS, strict=False):
        encoder = encoding.open()
        for number in range(start, stop):
            picture = scaler.reformat(
                VideoFrame.from_ndarray(FRAMES[number], format="rgb24"),
                format="yuv420p",
                dst_colorspace=module.Colorspace.ITU709,
                dst_color_range=module.ColorRange.MPEG,
                interpolation=module.SCALER,
            )
            picture.pts, picture.time_base = number, 1 / RATE
            lone += [bytes(packet) for packet in encoder.encode(picture)]
        lone += [bytes(packet) for packet in encoder.encode(None)]
    assert packets == lone


def test_two_parts_take_the_time_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each encoder waits at every picture until the other has one as well."""
    together = threading.Barrier(2, timeout=SOON)
    on_encode(monkeypatch, lambda part, picture: together.wait() and None)
    with VideoWriter(tmp_path / "out.mp4", *SIZE, RATE) as writer:
        for number, frame in enumerate(FRAMES, 1):
            writer.write(frame)
            if number in (20, 40):
                writer.settle()
        writer.finish()
    assert len(read_frames(tmp_path / "out.mp4")) == 40


@pytest.mark.parametrize(("size", "most"), [(10, PARTS * 10), (10_000, WAITING + 1)])
def test_what_waits_for_encoders_is_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, most: int
) -> None:
    go = threading.Event()
    on_encode(monkeypatch, lambda part, picture: waited(go))
    with VideoWriter(tmp_path / "out.mp4", *SIZE, RATE) as writer:

        def fill() -> None:
            for number in range(1, 151):
                writer.write(FRAMES[0])
                if number % size == 0:
                    writer.settle()

        filler = threading.Thread(target=fill)
        filler.start()
        until(lambda: writer.frames >= most)
        time.sleep(0.1)
        # One more picture is counted while it waits for room, or none where its part cannot begin.
        assert most <= writer.frames <= most + 1 and threads() <= PARTS
        go.set()
        filler.join(SOON)
        writer.finish()
    assert len(read_frames(tmp_path / "out.mp4")) == 150


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("last", [False, True])
def test_an_encoder_that_fails_keeps_what_comes_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: int, last: bool
) -> None:
    """At a picture, or at the end of its part if it is the `last` packets that fail. The other of two parts
    is encoded whole meanwhile.
    """
    at = None if last else (0, *ENDS)[fails] + 5
    other, failed, ends = threading.Event(), threading.Event(), list[int]()

    def act(part: int, picture: int | None) -> None:
        if part == fails and picture == at:
            if not fails:
                waited(other)
            failed.set()
            raise RuntimeError(f"part {part}")
        if part == 1 - fails and picture is None:
            if fails:
                waited(failed)
            other.set()

    on_encode(monkeypatch, act)
    writer = VideoWriter(tmp_path / "out.mp4", *SIZE, RATE)
    with pytest.raises(RuntimeError, match=f"part {fails}"):
        for number, frame in enumerate(FRAMES, 1):
            writer.write(frame)
            if number in ENDS:
                writer.settle(lambda end: ends.append(end.pictures))
        writer.finish()
    kept = writer.abandon(keep=True)
    whole = (0, *ENDS)[fails]
    assert ends == [*ENDS[:fails]] and writer.kept == (whole if last else whole + 5)
    assert (kept is None) == (writer.kept == 0) and threads() == 0
    if kept is not None:
        assert len(read_frames(kept)) == writer.kept
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial.mp4"]


def test_a_full_disk_shows_without_another_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second part does not fit. Frames of the third, which is encoded by then, are after a gap."""
    append = WorkingFile.append

    def full(file: WorkingFile, *packets: Any) -> None:
        if file.pictures == 13:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, *packets)

    monkeypatch.setattr(WorkingFile, "append", full)
    writer, ends = VideoWriter(tmp_path / "out.mp4", *SIZE, RATE), list[int]()

    def full_disk() -> bool:
        try:
            writer.check()
        except OutputError as error:
            assert "The disk is full" in error.message
            return True
        return False

    for number, frame in enumerate(FRAMES[:25], 1):
        writer.write(frame)
        if number in ENDS:
            writer.settle(lambda end: ends.append(end.pictures))
    until(full_disk)
    for act in (lambda: writer.write(FRAMES[0]), writer.finish):
        with pytest.raises(OutputError, match="The disk is full"):
            act()
    assert writer.abandon(keep=True) == writer.partial and writer.kept == 13 and ends == [13]
    assert len(read_frames(writer.partial)) == 13 and threads() == 0


def test_abandoning_keeps_parts_that_are_not_encoded_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_encode(monkeypatch, lambda part, picture: time.sleep(0.01))
    writer, ends = VideoWriter(tmp_path / "out.mp4", *SIZE, RATE), list[int]()
    for number, frame in enumerate(FRAMES[:30], 1):
        writer.write(frame)
        if number in ENDS:
            writer.settle(lambda end: ends.append(end.pictures))
    assert writer.abandon(keep=True) == writer.partial and writer.kept == 30 and ends == [13, 25]
    assert len(read_frames(writer.partial)) == 30 and threads() == 0


def test_abandoning_at_once_drops_what_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second part has all its pictures, of which most wait. It does not count as settled."""
    go = threading.Event()

    def act(part: int, picture: int | None) -> None:
        if (part, picture) == (1, 15):
            go.wait()

    on_encode(monkeypatch, act)
    writer, ends = VideoWriter(tmp_path / "out.mp4", *SIZE, RATE), list[int]()
    for number, frame in enumerate(FRAMES[:25], 1):
        writer.write(frame)
        if number in ENDS:
            writer.settle(lambda end: ends.append(end.pictures))
    until(lambda: ends == [13])
    threading.Timer(0.3, go.set).start()  # after the pictures were dropped
    assert writer.abandon(keep=True, at_once=True) == writer.partial
    assert 13 <= writer.kept <= 16 and ends == [13] and threads() == 0
    assert len(read_frames(writer.partial)) == writer.kept


def test_a_part_without_pictures_ends_too(tmp_path: Path) -> None:
    ends = list[int]()
    with VideoWriter(tmp_path / "out.mp4", *SIZE, RATE) as writer:
        writer.settle(lambda end: ends.append(end.pictures))
        writer.write(FRAMES[0])
        for _ in range(2):
            writer.settle(lambda end: ends.append(end.pictures))
        writer.finish()
    assert ends == [0, 1, 1] and len(read_frames(tmp_path / "out.mp4")) == 1
