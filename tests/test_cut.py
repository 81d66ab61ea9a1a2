"""--start and --end: the right frames, the right rate, the sound from there on."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from lengths import faults, make_sound, measured, write
from made_clips import FakePeople, FakeSegmenter, make, write_reference
from test_video import difference, make_clip, numbered, read_all
from tiny_job import read_frames

import trt_wan.cli.run
import trt_wan.preprocess.stages
from trt_wan.cli.main import cli
from trt_wan.errors import InputError, UsageError
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.job import Inputs
from trt_wan.runtime.video.clips import open_clips
from trt_wan.runtime.video.cut import Cut, Mark
from trt_wan.runtime.video.pictures import write_picture
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.video.stills import open_clip
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.weights.tiny import write_tiny_weights


def cut(start: str = "", end: str = "") -> Cut:
    return Cut(Mark.of(start) if start else None, Mark.of(end) if end else None)


@pytest.mark.parametrize(
    ("text", "value", "is_time"),
    [("0", 0, False), ("120", 120, False), ("5.5", 5.5, True), ("83s", 83, True), ("1:23.5", 83.5, True)]
    + [("1:00:01", 3601, True), ("0:07s", 7, True)],
)
def test_marks(text: str, value: float, is_time: bool) -> None:
    assert Mark.of(text) == Mark(Fraction(value), is_time)


@pytest.mark.parametrize("text", ["", "-1", "1e9", "1/2", "5 s", "1:2:3:4", "soon", "9" * 40, "٣"])
def test_what_is_no_mark(text: str) -> None:
    with pytest.raises(UsageError):
        Mark.of(text)


# At 25 frames per second, of 30 frames.
CUTS = [("10", "", 10, 30), ("", "12", 0, 12), ("7", "8", 7, 8), ("0.4", "", 10, 30), ("0.41", "", 11, 30)]
CUTS += [("9", "0.8s", 9, 20), ("0:00.04", "1.2", 1, 30), ("29", "30", 29, 30)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
@pytest.mark.parametrize(("start", "end", "first", "last"), CUTS)
def test_the_frames_of_a_cut(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, start: str, end: str, first: int, last: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"cut{suffix}"
    if not path.exists():
        make_clip(path, numbered(30))
    whole = read_all(path)
    with Clip(path, cut=cut(start, end)) as clip:
        assert (clip.used, clip.frames, clip.rate) == (range(first, last), last - first, 25)
        assert abs(clip.start - Fraction(first, 25)) < Fraction(1, 1000)
        assert (
            difference(np.concatenate([clip.window([k]) for k in range(clip.frames)]), whole[first:last]) == 0
        )


def test_a_cut_of_uneven_frames_has_their_own_rate(tmp_path: Path) -> None:
    """25 frames per second, then 10: the mean of the whole clip would play each part at the wrong speed."""
    times = [40 * i for i in range(20)] + [800 + 100 * i for i in range(20)]
    path = make_clip(tmp_path / "clip.mkv", numbered(40), times=times)
    with Clip(path, cut=cut("", "0.8s")) as fast, Clip(path, cut=cut("0.8s")) as slow:
        assert (fast.used, float(fast.rate)) == (range(20), pytest.approx(25))
        assert (slow.used, float(slow.rate), slow.start) == (range(20, 40), pytest.approx(10), Fraction(4, 5))
        assert not fast.notes or all(note.code != "variable_rate" for note in (*fast.notes, *slow.notes))


@pytest.mark.parametrize(
    ("start", "end"), [("30", ""), ("", "31"), ("1.2", ""), ("", "1.3s"), ("1.03", "1.035"), ("", "0")]
)
def test_a_cut_outside_the_clip_is_refused(tmp_path: Path, start: str, end: str) -> None:
    path = make_clip(tmp_path / "clip.mp4", numbered(30))
    with pytest.raises(InputError) as caught:
        Clip(path, cut=cut(start, end))
    assert caught.value.hint and "clip.mp4" in caught.value.message and "None" not in caught.value.message


@pytest.mark.parametrize(("start", "end"), [("5", "5"), ("5", "4"), ("2s", "1s")])
def test_a_cut_of_nothing_is_refused_before_any_file(start: str, end: str) -> None:
    with pytest.raises(UsageError):
        cut(start, end)


def test_numbered_pictures_are_cut_too(tmp_path: Path) -> None:
    frames = numbered(9)
    for k, frame in enumerate(frames):
        write_picture(tmp_path / f"{k:03}.png", frame)
    with open_clip(tmp_path, rate=Fraction(10), cut=cut("0.2s", "7")) as clip:
        assert (clip.frames, clip.start) == (5, Fraction(1, 5))
        assert difference(clip.window(range(5)), frames[2:7]) == 0


def test_all_prepared_clips_are_cut_alike_but_one_picture_stays(tmp_path: Path) -> None:
    frames = numbered(30)
    make_clip(tmp_path / "pose.mp4", frames)
    make_clip(tmp_path / "mask.mp4", frames, rate=Fraction(30))  # frame k belongs to frame k
    for name in ("ref.png", "bg.png"):
        write_picture(tmp_path / name, frames[0])
    files: dict[str, Any] = {name: tmp_path / f"{name}.mp4" for name in ("pose", "mask")}
    inputs = Inputs(
        tmp_path / "ref.png", files["pose"], None, tmp_path / "bg.png", files["mask"], cut=cut("0.4s", "20")
    )
    with open_clips(inputs, 9) as clips:
        assert (clips.frames, clips.start) == (10, Fraction(2, 5))
        assert clips.background and clips.background.frames == 1
        assert clips.mask and difference(clips.mask.window(range(10)), read_all(files["mask"])[10:20]) == 0


# Frames per second of the clip; its first used frame; the source of the sound.
SOUNDS = [
    ("24000/1001", 31, "aac.mp4"),
    ("30000/1001", 100, "aac.mp4"),
    ("25", 50, "late.mp4"),
    ("30", 7, "flac.mkv"),
    ("30000/1001", 12, "early.mkv"),
    ("24000/1001", 0, "early.mkv"),
]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    make_sound(folder / "aac.mp4", 6)
    make_sound(folder / "flac.mkv", 6, "flac", rate=44_100)
    make_sound(folder / "late.mp4", 6, start=2.5)
    make_sound(folder / "early.mkv", 6, start=-0.4)
    return folder


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize(("rate", "first", "source"), SOUNDS)
def test_sound_starts_with_the_cut(
    tmp_path: Path, sounds: Path, suffix: str, rate: str, first: int, source: str
) -> None:
    """Its clicks are at tenths of a second of the whole clip, and move by the time that is cut off."""
    count, per_second = 31, Fraction(rate)
    start = first / per_second
    path = tmp_path / f"out{suffix}"
    with VideoWriter(path, 96, 64, per_second, sounds / source, sound_start=start) as writer:
        for _ in range(count):
            writer.write(np.zeros((64, 96, 3), np.uint8))
        writer.finish()
    found = measured(path, clicks_from=float(start))
    exact = suffix == ".mp4"
    assert not faults(found, count, per_second, exact, greys=False) and found.by_time is not None


def test_preparing_cuts_the_clip_with_its_sound(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4", 60, Fraction(25), make_sound(tmp_path / "sound.mp4", 3))
    people = FakePeople()
    folder = make(tmp_path, clip, people, cut=cut("1.2s", "55"))
    assert len(people.seen) == 25 and len(read_frames(folder / "src_pose.mp4")) == 25
    found = measured(folder / "src_pose.mp4", clicks_from=1.2)
    assert not faults(found, 25, Fraction(25), greys=False) and found.by_time is not None


class Watching(FakePeople):
    """Keeps a grey of every frame that it is shown."""

    def follow(self, frames: Any, choice: Any, progress: Any) -> Any:
        def watched() -> Iterator[Picture]:
            for frame in frames:
                self.greys.append(float(frame[32, 48].mean()))
                yield frame

        self.greys: list[float] = []
        return super().follow(watched(), choice, progress)


def test_uneven_frames_stay_beside_their_sound(tmp_path: Path) -> None:
    """A frame is shown to half of the longest spacing at its own time; by the mean rate 0.6 s off."""
    times = [40 * i for i in range(20)] + [800 + 100 * i for i in range(20)]
    path = make_clip(tmp_path / "clip.mkv", numbered(40), times=times)
    people = Watching()
    make(tmp_path, path, people)
    given = read_all(path)[:, 32, 48].mean(axis=1)
    with Clip(tmp_path / "out" / "src_pose.mp4") as clip:
        assert clip.frames == len(people.greys) == 40
        for k, grey in enumerate(people.greys):
            near = np.flatnonzero(np.abs(given - grey) < 1)
            assert min(abs(times[i] / 1000 - k / float(clip.rate)) for i in near) <= 0.051


def test_the_options_cut_the_clip_once(
    tmp_path: Path, tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `preprocess`, and by `run`, which prepares a clip that is cut and then uses all of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    stages = Stages(FakePeople(), FakeSegmenter())
    monkeypatch.setattr(trt_wan.preprocess.stages, "open_stages", lambda *_, **options: stages)
    rendered: list[Any] = []

    def render(report: Any, folder: Path, output: Path, options: Any, **others: Any) -> Any:
        rendered.append((options.cut, options.inputs(folder).cut))
        return output, {}

    monkeypatch.setattr(trt_wan.cli.run, "render_prepared", render)
    write_tiny_weights(tmp_path / "weights", seed=0)
    write_reference(tmp_path / "character.png", (64, 48))
    make_clip(tmp_path / "dance.mp4", numbered(30))
    cutting = ["--start", "0.2s", "--end", "20", "--size", "64x48", "--no-face"]
    run = ["run", "--weights", "weights", "-o", "out.mp4", "--window", "13"]
    for command in (["preprocess", "-o", "prepared"], run):
        result = CliRunner().invoke(cli, [*command, "character.png", "dance.mp4", *cutting])
        assert result.exit_code == 0, result.output
    for folder in ("prepared", "out.inputs"):
        assert len(read_frames(tmp_path / folder / "src_pose.mp4")) == 15
    assert rendered == [(None, None)]
    result = CliRunner().invoke(cli, [*run, "-y", "--inputs", "prepared", "--start", "3", "--end", "5"])
    assert result.exit_code == 0 and rendered[1] == (cut("3", "5"),) * 2
    for wrong in (["--start", "soon"], ["--start", "5", "--end", "5"], ["--end", "99"]):
        result = CliRunner().invoke(cli, ["preprocess", "-o", "other", "character.png", "dance.mp4", *wrong])
        assert result.exit_code in (1, 2) and not (tmp_path / "other").exists()
