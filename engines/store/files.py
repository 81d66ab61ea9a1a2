"""Files that are there completely or not at all: written under a temporary name, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_native_id


def replace_atomically(path: Path, data: bytes | str, *, sync: bool = False) -> None:
    """Writes `data` to `path`; on any error the old file stays and no temporary one is left.

    With `sync` the bytes reach the disk before the name does, so that also a power failure leaves one of the
    two. Makes the folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{get_native_id()}.partial")
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
