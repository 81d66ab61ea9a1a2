"""Locks between processes: files that one process at a time holds."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def held(lock: Path, wait: bool = True) -> Iterator[bool]:
    """Holds `lock`. Without `wait` it yields False where another process holds it."""
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    taken = FileLock(lock, timeout=-1 if wait else 0)
    try:
        taken.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        taken.release()


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
