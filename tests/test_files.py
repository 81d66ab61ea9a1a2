"""Writing a file: all of it or nothing, and nothing left beside it."""

import os
import threading
from pathlib import Path

import pytest

from trt_wan.engines.store.files import keep, replace_atomically


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("data", [b"new", "new"])
def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path, data: bytes | str, sync: bool) -> None:
    path = tmp_path / "a" / "b" / "file"
    for _ in range(2):
        replace_atomically(path, data, sync=sync)
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def fail(*values: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "write", "rename"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    data: bytes | str = b"new"
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif call == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        data = "\ud800"  # cannot be encoded: raised when the file is open
    with pytest.raises((OSError, UnicodeEncodeError)):
        replace_atomically(path, data, sync=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_a_folder_that_cannot_be_synced_leaves_no_descriptor_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems refuse it. In engines.py it leaked a descriptor for each engine."""
    synced: list[int] = []

    def second_fails(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) % 2 == 0:
            fail()

    monkeypatch.setattr(os, "fsync", second_fails)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            replace_atomically(tmp_path / "file", b"new", sync=True)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keep(tmp_path / "file", b"data")
    (tmp_path / "no folder").write_text("")
    assert not keep(tmp_path / "no folder" / "file", b"data")
    monkeypatch.setattr(os, "open", fail)
    monkeypatch.setattr(Path, "replace", fail)
    assert not keep(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_writers_side_by_side_leave_one_whole_file(tmp_path: Path) -> None:
    """Threads of one process too."""
    path, whole = tmp_path / "file", [bytes([n]) * 100_000 for n in range(4)]
    threads = [threading.Thread(target=keep, args=(path, data)) for data in whole]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in whole and list(tmp_path.iterdir()) == [path]
