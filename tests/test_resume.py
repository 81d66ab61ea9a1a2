"""A video that was stopped and gone on with is that of one process, byte for byte. A state that is not usable
is refused in one sentence, and stays. The networks are made up; tests/kills.py kills real runs.
"""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import on_encode
from tiny_job import PLAN, prepare, write_sound

from trt_wan.engines.store.locks import held
from trt_wan.errors import OutputError, Stopped, TrtWanError, UsageError
from trt_wan.runtime.events import Event, Note, Progress, WindowDone
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.kept import windows as kept
from trt_wan.runtime.kept.record import Record, read_record
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.pipeline import Keep, ShouldStop
from trt_wan.runtime.render import render
from trt_wan.runtime.video.clips import Clips
from trt_wan.runtime.window_state import WindowState
from trt_wan.runtime.windows import Windows

FRAMES = 40  # four windows
RECORD = Record(
    {"trt-wan": "1"}, {"seed": 0}, {"name": "none"}, {"pose": [{"name": "a.mp4", "sha256": "1"}]}, {}
)
NAMES = {"partial": "out.partial.mp4", "state": "out.partial.mp4.state"}


class Chained:
    """An open model whose windows depend on the carried frames and on all noise before; `stop` in a window,
    after its first piece, or before it for a negative number.
    """

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.made = stop, 0

    def pieces(
        self,
        job: Job,
        *,
        clips: Clips | None,
        progress: Progress,
        should_stop: ShouldStop,
        begin_from: WindowState | None,
        keep: Keep,
    ) -> Iterator[Array]:
        windows = Windows(FRAMES, job.window, job.overlap)
        generator, carried = CpuGenerator(job.seed), np.zeros((3, 1, PLAN.height, PLAN.width), np.float32)
        if begin_from is not None:
            generator, carried = CpuGenerator.from_state(begin_from.generator), begin_from.carried
        for j in range(begin_from.done if begin_from else 0, windows.total):
            if self.stop == -(j + 1):
                raise Stopped("Stopped.")
            self.made += 1
            frames = np.tanh(generator.randn((3, job.window, PLAN.height, PLAN.width)) + carried)
            for piece in np.split(frames[:, windows.keep(j)], [5], axis=1):
                if piece.shape[1]:
                    yield piece
                if self.stop == j + 1:
                    raise Stopped("Stopped.")
            carried = frames[:, -1:]
            keep(WindowState(j + 1, carried, generator.state(), frames[:, :2]))
            progress(WindowDone(j + 1, windows.total, windows.keep(j).stop - windows.keep(j).start))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return prepare(folder, write_sound(folder / "tone.m4a", 2), FRAMES)


class Place:
    def __init__(self, clips: Path, folder: Path) -> None:
        self.clips, self.folder, self.events = clips, folder, list[Event]()

    def run(self, model: Chained, name: str = "out.mp4", record: Record = RECORD, **options: Any) -> bytes:
        mode: Any = "replace" if options.get("paste_back") else "animate"
        job = Job(Inputs.from_folder(self.clips, mode), mode=mode, window=PLAN.frames)
        output = self.folder / name
        return render(
            job, model, output, record=record, progress=self.events.append, **options
        ).path.read_bytes()

    def stopped(self, stop: int, **options: Any) -> None:
        with pytest.raises(Stopped):
            self.run(Chained(stop), **options)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    @property
    def codes(self) -> set[str]:
        return {event.code for event in self.events if isinstance(event, Note)}


@pytest.fixture
def place(clips: Path, tmp_path: Path) -> Place:
    return Place(clips, tmp_path)


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    place = Place(clips, tmp_path_factory.mktemp("whole"))
    return {paste: place.run(Chained(), f"{paste}.mp4", paste_back=paste) for paste in (False, True)}


@pytest.mark.parametrize("stops", [(1,), (2,), (-2,), (3,), (4,), (2, 3, -4)])
def test_a_video_gone_on_with_has_the_same_bytes(
    place: Place, whole: dict[bool, bytes], stops: tuple[int, ...]
) -> None:
    for number, stop in enumerate(stops):
        place.stopped(stop, resume=number > 0)
    model = Chained()
    assert place.run(model, resume=True) == whole[False]
    assert model.made == 4 - (abs(stops[-1]) - 1), "finished windows are not made again"
    assert place.names() == {"out.mp4", "out.json"}
    assert ("replaced_partial" in place.codes) == (stops == (1,)), "a window that was not finished"
    assert read_record(place.folder / "out.mp4") == RECORD


def test_windows_that_are_still_encoded_at_a_stop_are_kept(
    place: Place, whole: dict[bool, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window takes its encoder longer than all others together."""
    on_encode(monkeypatch, lambda part, picture: time.sleep(0 if part else 0.02))
    place.stopped(3)
    model = Chained()
    assert place.run(model, resume=True) == whole[False] and model.made == 2


def test_a_window_after_one_whose_encoder_failed_is_not_kept(
    place: Place, whole: dict[bool, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(part: int, picture: int | None) -> None:
        if (part, picture) == (1, None):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="Cannot allocate memory"):
        on_encode(patched, act)
        place.run(Chained())
    model = Chained()
    assert place.run(model, resume=True) == whole[False] and model.made == 3


def test_pixels_are_pasted_back_from_the_right_frames(place: Place, whole: dict[bool, bytes]) -> None:
    place.stopped(3, paste_back=True)
    assert place.run(Chained(), paste_back=True, resume=True) == whole[True] != whole[False]


def test_without_resume_what_was_kept_stays(place: Place, whole: dict[bool, bytes]) -> None:
    place.stopped(3)
    before = contents(place.folder)
    assert place.run(Chained()) == whole[False]
    after = contents(place.folder)
    assert set(after) - set(before) == {"out.mp4", "out.json"} and before.items() <= after.items()


def test_without_resume_the_frames_that_were_kept_stay_too(place: Place) -> None:
    """They are gone on with, also after another run that was stopped."""
    png = place.folder / "png"
    place.stopped(3, frames=png)
    place.stopped(1, frames=png)
    place.run(Chained(), frames=png, resume=True)
    assert [path.name for path in sorted(png.iterdir())] == [f"{k:05}.png" for k in range(FRAMES)]


def test_with_nothing_kept_a_run_begins_at_the_first_frame(place: Place, whole: dict[bool, bytes]) -> None:
    assert place.run(Chained(), resume=True) == whole[False] and "kept_nothing" in place.codes


def test_a_begun_file_that_may_hold_more_than_a_part_of_this_job_stays(place: Place) -> None:
    """That of another job; one with more frames than the first window whose state is gone; one that was begun
    without --resume.
    """
    other = replace(RECORD, job={"seed": 8})
    place.stopped(1, record=other)
    place.stopped(3)
    shutil.rmtree(place.folder / "out.partial-2.mp4.state")
    before = contents(place.folder)
    place.run(Chained(), resume=True)
    assert before.items() <= contents(place.folder).items() and "replaced_partial" not in place.codes
    place.stopped(1, name="new.mp4", record=other)
    place.run(Chained(), name="new.mp4", record=other)
    assert {"new.mp4", "new.partial.mp4"} < place.names()


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif"])
@pytest.mark.parametrize("has_partial", [False, True])
def test_the_remains_of_a_process_that_was_killed_after_its_last_rename(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str, has_partial: bool
) -> None:
    partial = place.folder / f"out.partial{'.mp4' if name.endswith('f') else name[3:]}"
    state, lock = kept.folder_of(partial), place.folder / f".{name}.lock"
    with monkeypatch.context() as patch:
        patch.setattr(kept, "remove", lambda partial: None)
        place.run(Chained(), name=name)
    lock.touch()
    (place.folder / f".{name}.redo").mkdir()  # of a process that replaced the video (redo.py)
    if has_partial:
        shutil.copy(place.folder / name, partial)
    before = contents(place.folder)
    assert (state / "state.json").exists()
    with held(lock, wait=False):
        kept.forget_finished(place.folder / name)
        assert contents(place.folder) == before, "another run is at it"
    lock.touch()
    kept.forget_finished(place.folder / name)
    assert place.names() == {name, "out.json"}
    other = Place(place.clips, place.folder / "other")
    other.folder.mkdir()
    other.stopped(3, name=name, record=replace(RECORD, job={"seed": 8}))
    shutil.copytree(kept.folder_of(other.folder / partial.name), state)
    before = contents(place.folder)
    kept.forget_finished(place.folder / name)
    assert contents(place.folder) == before, "a state of another job"


def test_the_state_of_this_job_is_found_among_others(place: Place, whole: dict[bool, bytes]) -> None:
    other = replace(RECORD, job={"seed": 8})
    place.stopped(2)
    place.stopped(3)
    place.stopped(4, record=other)
    model = Chained()
    assert place.run(model, resume=True) == whole[False] and model.made == 2, "the one with most windows"
    assert {"out.partial.mp4.state", "out.partial-3.mp4.state"} < place.names()


def test_other_versions_are_told(place: Place) -> None:
    place.stopped(3)
    place.run(Chained(), record=replace(RECORD, versions={"trt-wan": "2"}), resume=True)
    (text,) = [
        event.text for event in place.events if isinstance(event, Note) and event.code == "other_versions"
    ]
    assert "trt-wan 1 (now 2)" in text


@pytest.mark.parametrize("fails", ["windows-2.npz", "state.json"])
def test_a_state_that_cannot_be_written_leaves_the_one_before(
    place: Place, whole: dict[bool, bytes], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """As when the disk is full, or the process is killed between two files."""
    write, count = kept.replace_atomically, 0

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        nonlocal count
        count += path.name == fails
        if path.name == fails and count == (2 if fails == "state.json" else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *arguments, **options)

    monkeypatch.setattr(kept, "replace_atomically", full)
    with pytest.raises(OutputError, match="disk is full"):
        place.run(Chained())
    model = Chained()
    assert place.run(model, resume=True) == whole[False] and model.made == 3


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edited(**changes: Any) -> Callable[[Path, Path], None]:
    def act(partial: Path, state: Path) -> None:
        values = json.loads((state / "state.json").read_text())
        del values[kept.CHECKSUM]
        (state / "state.json").write_text(kept.index_text({**values, **changes}))

    return act


def replaced(before: str, after: str) -> Callable[[Path, Path], None]:
    def act(partial: Path, state: Path) -> None:
        text = (state / "state.json").read_text()
        assert before in text
        (state / "state.json").write_text(text.replace(before, after))

    return act


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def altered(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1
    file.write_bytes(data)


SECOND = "out.partial-2.mp4.state"
NOT_WRITTEN = "windows-2.npz is missing or not"
HOSTILE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "cut index": (lambda partial, state: cut(state / "state.json", 100), "is damaged: its state.json"),
    "no index at all": (lambda partial, state: (state / "state.json").write_bytes(b"\0" * 50), "is damaged"),
    "another program's": (lambda partial, state: (state / "state.json").write_text('["a"]'), "is damaged"),
    "another number": (replaced('"pictures": 25', '"pictures": 24'), "is damaged: its state.json"),
    "deep": (lambda partial, state: (state / "state.json").write_text("[" * 100_000), "is damaged"),
    "wrong types": (edited(windows={"done": "2", "file": 3, "sha256": None}), "is damaged"),
    "another folder's file": (edited(windows={"done": 2, "file": "../x", "sha256": ""}), "is damaged"),
    "no record": (edited(record={}), "is damaged"),
    "newer": (edited(format=2), "kept by a newer trt-wan"),
    "cut state": (lambda partial, state: cut(state / "windows-2.npz", 5000), NOT_WRITTEN),
    "altered state": (lambda partial, state: altered(state / "windows-2.npz"), NOT_WRITTEN),
    "no state": (lambda partial, state: (state / "windows-2.npz").unlink(), NOT_WRITTEN),
    "moved video": (lambda partial, state: partial.rename(partial.with_name("a.mp4")), "which is not there"),
    "cut video": (lambda partial, state: cut(partial, 3000), "is shorter than it was"),
    "altered video": (lambda partial, state: altered(partial), "has been changed"),
    "renamed": (lambda partial, state: state.rename(state.with_name(SECOND)), "is damaged: it is"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_gone_on_with_is_refused_and_stays(
    stopped: Path, tmp_path: Path, name: str, clips: Path
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    act, says = HOSTILE[name]
    act(folder / NAMES["partial"], folder / NAMES["state"])
    before = contents(folder)
    with pytest.raises(TrtWanError) as caught:
        Place(clips, folder).run(Chained(), resume=True)
    assert says in caught.value.message and "Leave out --resume" in caught.value.hint
    assert len(caught.value.message) < 400 and contents(folder) == before


@pytest.fixture(scope="module")
def stopped(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(clips, tmp_path_factory.mktemp("stopped"))
    place.stopped(3)
    return place.folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"job": {"seed": 8}}, "seed 0 (now 8)"),
        ({"job": {"seed": 0, "steps": 4}}, "steps none (now 4)"),
        ({"files": {"pose": [{"name": "a.mp4", "sha256": "2"}]}}, "pose a.mp4 has other content"),
        ({"files": {"pose": [{"name": "b.mp4", "sha256": "2"}]}}, "pose a.mp4 (now b.mp4)"),
        ({"files": {}}, "pose a.mp4 (now none)"),
        ({"video": {"paste_back": True}}, "paste back none (now True)"),
    ],
)
def test_another_job_is_refused_and_its_difference_named(
    stopped: Path, clips: Path, changes: dict[str, Any], says: str
) -> None:
    before = contents(stopped)
    with pytest.raises(UsageError, match="is of another job") as caught:
        Place(clips, stopped).run(Chained(), record=replace(RECORD, **changes), resume=True)
    assert says in caught.value.message and contents(stopped) == before


def test_a_video_and_its_state_may_be_moved(stopped: Path, clips: Path, tmp_path: Path, whole: Any) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "moved"))
    assert Place(clips, folder).run(Chained(), resume=True) == whole[False]


def test_a_file_of_the_users_beside_the_video_stays(place: Place) -> None:
    (place.folder / "out.json").write_text('{"mine": 1}')
    place.run(Chained())
    assert (place.folder / "out.json").read_text() == '{"mine": 1}' and "sidecar_kept" in place.codes
    assert read_record(place.folder / "out.mp4") == RECORD
