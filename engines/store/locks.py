"""Locks between processes: files that one process at a time holds."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Waiting = Callable[[Path, int | None], None]  # the lock, and the process that holds it if that is known


def in_silence(lock: Path, process: int | None) -> None:
    """Waits for a lock without a word: for moments."""


@contextmanager
def held(lock: Path, wait: bool = True, waiting: Waiting = in_silence) -> Iterator[bool]:
    """Holds `lock`. Where another process holds it, it calls `waiting` once and waits; without `wait` it
    yields False. Raises OSError where no file can be made.
    """
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    taken = FileLock(lock)
    try:
        taken.acquire(timeout=0)
    except Timeout:
        if not lock.exists():  # filelock also times out where no file can be made, as in /proc
            lock.touch()
        if not wait:
            yield False
            return
        waiting(lock, _holder(lock))
        taken.acquire()
    try:
        yield True
    finally:
        taken.release()


def is_held(lock: Path) -> bool:
    """Whether a process holds `lock`, which need not exist."""
    if not lock.exists():
        return False
    try:
        with held(lock, wait=False) as ours:
            return not ours
    except OSError:  # a folder that this user may only read: no one builds there
        return False


def forget_locks(folder: Path, wanted: Collection[str] = ()) -> None:
    """Removes the locks in `folder` that no process holds, but for those with the names `wanted`.

    A process that is just waiting for one of them may then build beside another: both write the same.
    """
    for lock in folder.glob("*.lock"):
        if lock.stem in wanted:
            continue
        with suppress(OSError), held(lock, wait=False) as ours:
            if ours:
                lock.unlink(missing_ok=True)


def _holder(lock: Path) -> int | None:
    """The process that holds `lock`, where the kernel tells (Linux)."""
    with suppress(OSError, ValueError):
        found = os.stat(lock)
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 5520 fe:00:16040098 0 EOF
            fields = line.split()
            if "->" not in fields and fields[5] == device and int(fields[4]) > 0:
                return int(fields[4])
    return None
