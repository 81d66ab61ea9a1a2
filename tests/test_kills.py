"""A few moments of tests/kills.py, which takes a thousand by hand."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from kills import KILL, Base, Moment, fill_a_disk, make_base, report, run_moment

IN_A_BUILD = 6.0  # seconds; on a slow machine torch is still being imported


def base_with(folder: Path, tiny_home: Path, kind: str) -> Base:
    """The graphs are there: `tiny_home` is of the same size and window."""
    shutil.copytree(tiny_home, folder / "home")
    return make_base(folder, (kind,))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path) -> Base:
    base = base_with(tmp_path_factory.mktemp("kills") / "base", tiny_home, "run")
    return replace(base, seconds={**base.seconds, "resume": base.seconds["run"]})


@pytest.mark.parametrize(
    ("kind", "part", "number"),
    [
        ("resume", 0.85, KILL),  # a run that is killed, and goes on
        pytest.param("run", 0.75, KILL, marks=pytest.mark.long),
        pytest.param("resume", 0.7, KILL, marks=pytest.mark.long),
        pytest.param("resume", 0.95, KILL, marks=pytest.mark.long),
        pytest.param("run", 0.75, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("run", 0.75, signal.SIGINT, marks=pytest.mark.long),
        pytest.param("run", 0.75, signal.SIGHUP, marks=pytest.mark.long),
        pytest.param("run", 0.5, KILL, marks=pytest.mark.long),
    ],
)
def test_a_killed_command_loses_nothing(
    base: Base, tmp_path: Path, kind: str, part: float, number: int
) -> None:
    moment = run_moment(base, Moment(kind, number, part), tmp_path / "moment")
    assert not moment.faults, moment


@pytest.mark.long
def test_a_killed_preparation_loses_nothing(tmp_path: Path, tiny_home: Path) -> None:
    base = base_with(tmp_path / "base", tiny_home, "preprocess")
    moment = run_moment(base, Moment("preprocess", KILL, 0.8), tmp_path / "moment")
    assert not moment.faults, moment


@pytest.mark.long
def test_a_build_goes_on_where_it_was_killed(base: Base, tmp_path: Path) -> None:
    timed = replace(base, seconds={"build": IN_A_BUILD})
    moment = run_moment(timed, Moment("build", KILL, 1), tmp_path / "moment")
    assert not moment.faults, moment


@pytest.mark.parametrize("share", [0.1, pytest.param(0.8, marks=pytest.mark.long)])
def test_a_full_disk_keeps_what_fits(base: Base, tmp_path: Path, share: float) -> None:
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    size = (base.whole("run") / "out.mp4").stat().st_size
    try:
        moment = fill_a_disk(base, tmp_path / "disk", 70_000 + int(share * size))
    except PermissionError:
        pytest.skip("this machine mounts nothing")
    assert not moment.faults, moment
    assert share > 0.1 or moment.returned == 1, "the disk was not full"


def test_faults_are_counted() -> None:
    """A run that lost a finished window would show in the report."""
    lost = Moment("run", 9, 0.5, windows=1, faults=["0 of 13 finished frames kept"])
    assert report([lost, Moment("run", 15, 0.5)])["faulty"] == 1
