"""The place of a finished video: kept work stays, one run at a time, and no input is overwritten."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from trt_wan.errors import OutputError, UsageError
from trt_wan.runtime.events import Event, Note
from trt_wan.runtime.video.target import claimed, refuse_inputs
from trt_wan.runtime.video.writer import VideoWriter

# A process that claims the file or folder argv[1], says so, and waits.
CLAIMING = """
import sys, time
from pathlib import Path
from trt_wan.runtime.video.target import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""


def stop_after(path: Path, frames: int, **options: bool) -> Path | None:
    """A job that ends after so many frames; the partial file that it keeps."""
    with VideoWriter(path, 64, 48, Fraction(25), **options) as writer:
        for _ in range(frames):
            writer.write(np.zeros((48, 64, 3), np.uint8))
        return writer.abandon(keep=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_later_runs_leave_a_kept_partial_file_alone(tmp_path: Path, suffix: str) -> None:
    """Runs that end before their first frame, after some, and finished ones; with and without overwriting."""
    path = tmp_path / f"out{suffix}"
    kept = stop_after(path, 3)
    assert kept == tmp_path / f"out.partial{suffix}"
    before = kept.read_bytes()
    assert stop_after(path, 0) is None and stop_after(path, 0, overwrite=True) is None
    assert stop_after(path, 2, overwrite=True) == tmp_path / f"out.partial-2{suffix}"
    with VideoWriter(path, 64, 48, Fraction(25), overwrite=True) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.finish()
    assert set(names(tmp_path)) == {f"out{suffix}", f"out.partial-2{suffix}", f"out.partial{suffix}"}
    assert kept.read_bytes() == before


def test_what_was_kept_is_told_and_what_is_empty_goes(tmp_path: Path) -> None:
    """A process that is killed before its first piece leaves no bytes, zeros, or a header."""
    path = tmp_path / "out.mp4"
    kept = [stop_after(path, 2), stop_after(path, 2)]
    header = tmp_path / "out.partial-3.mp4"
    whole = kept[0].read_bytes() if kept[0] else b""
    header.write_bytes(whole[: int.from_bytes(whole[:4])])
    (tmp_path / "out.partial-4.mp4").write_bytes(bytes(65_536))
    (tmp_path / "out.partial-5.mp4").touch()
    (tmp_path / ".out.partial-5.joining.mp4").write_bytes(b"half a file")
    strangers = ["out.partial-6.mp4", "out.partial-mine.mp4", "out.partial.mkv", "sout.partial.mp4"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    told: list[Event] = []
    with claimed(path, told.append):
        pass
    files = ["out.partial-2.mp4", "out.partial-6.mp4", "out.partial.mp4"]
    assert names(tmp_path) == sorted({*files, *strangers})
    (note,) = told
    assert isinstance(note, Note) and note.code == "kept_partial"
    assert note.data == {"files": [str(tmp_path / name) for name in files]} and str(kept[0]) in note.text


@pytest.fixture
def claiming(tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "out.mp4").write_text("old")
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIMING, "out.mp4"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path / "real",
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout is not None and process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("place", ["real/out.mp4", "folder/out.mp4", "link.mp4", "real/../real/out.mp4"])
def test_one_run_at_a_time_has_an_output(
    tmp_path: Path, claiming: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The output has one lock by all its names. A kill releases it, and the next run cleans up."""
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "link.mp4").symlink_to(Path("real") / "out.mp4")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="Another run is writing") as caught, claimed(Path(place)):
        pass
    assert caught.value.hint
    with claimed(Path("real/other.mp4")):
        assert names(tmp_path / "real") == [".other.mp4.lock", ".out.mp4.lock", "out.mp4"]
    claiming.send_signal(signal.SIGKILL)
    claiming.wait()
    with claimed(Path(place)), claimed(tmp_path / "real" / "out.mp4"):  # nested, by another name
        pass
    assert names(tmp_path / "real") == ["out.mp4"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the folder is Linux's")
def test_a_folder_that_takes_no_files_is_not_one_that_another_run_writes() -> None:
    with pytest.raises(OutputError, match="/proc/a.mp4 cannot be written"), claimed(Path("/proc/a.mp4")):
        pass


def test_a_claimed_folder_leaves_no_folders_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "a" / "b" / "prepared"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_video_goes_where_its_link_points(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.mp4").symlink_to(Path("elsewhere") / "real.mp4")
    with VideoWriter(tmp_path / "out.mp4", 64, 48, Fraction(25)) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        assert writer.partial == tmp_path / "elsewhere" / "real.partial.mp4"
        writer.finish()
    assert (tmp_path / "out.mp4").is_symlink() and names(tmp_path / "elsewhere") == ["real.mp4"]


def test_an_input_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models" / "deep"
    models.mkdir(parents=True)
    files = [tmp_path / "clip.mp4", models / "model.safetensors", models / "film.mp4"]
    for file in files:
        file.write_text("mine")
    (tmp_path / "soft.mp4").symlink_to("clip.mp4")
    os.link(tmp_path / "clip.mp4", tmp_path / "hard.mp4")
    os.link(models / "model.safetensors", tmp_path / "model.mp4")
    inputs = [None, Path("missing.mp4"), Path("models"), Path("clip.mp4")]
    for name in ("clip.mp4", "models/../clip.mp4", "soft.mp4", "hard.mp4", "model.mp4"):
        with pytest.raises(UsageError, match=r"is an input of this job \((clip.mp4|.*safetensors)\)"):
            refuse_inputs(Path(name), inputs)
    refuse_inputs(Path("models/deep/film.mp4"), inputs)  # beside the models, not one of them
    refuse_inputs(Path("new.mp4"), inputs)
