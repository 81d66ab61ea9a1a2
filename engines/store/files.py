"""Files that are there completely or not at all: written under a temporary name, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_native_id
from typing import Any

PARTIAL = ".partial"  # a file or folder that is being made, or that a killed process left


def replace_atomically(path: Path, data: bytes | str, *, sync: bool = False) -> None:
    """Writes `data` to `path`; on any error the old file stays and no temporary one is left.

    With `sync` the bytes reach the disk before the name does, so that also a power failure leaves one of the
    two. Makes the folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{get_native_id()}{PARTIAL}")
    try:
        with named(path), temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync and os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Gives an OSError of the block the file's name, which Python leaves out where a write fails."""
    try:
        yield
    except OSError as error:
        error.filename = str(error.filename or path)
        raise


def keep(path: Path, data: bytes | str) -> bool:
    """`replace_atomically` for a cache, which never ends a job: False where the file cannot be written."""
    try:
        replace_atomically(path, data)
    except OSError:
        return False
    return True


def read_json(path: Path) -> Any:
    """The values of a JSON file in the store. None for one that is missing, damaged or nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def can_make(folder: Path) -> bool:
    """Whether `mkdir -p` could make `folder`: nothing else has its name or that of a folder above it, and the
    nearest folder that exists may be written to.
    """
    folder = folder.absolute()
    nearest = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    return nearest is not None and nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def stamp(file: Path) -> tuple[int, int]:
    """Size, and time of change in ns, which tell whether a file is the same. (-1, 0) for a missing one."""
    try:
        found = file.stat()
    except OSError:
        return (-1, 0)
    return found.st_size, found.st_mtime_ns


def forget_partials(folder: Path) -> None:
    """Removes the files in `folder` that killed processes left. Call under the lock of all its writers."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)
