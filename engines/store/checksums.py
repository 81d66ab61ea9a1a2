"""Checks a plan against the hash in its manifest, without reading a gigabyte each time.

Once a large plan has passed, a record of the file is kept beside it: size, inode, and the times of the last
write and the last change. A file that was written to, replaced, swapped or cut differs in one of them: on
POSIX the time of the last change cannot be set back. Windows has no such time, so an edit that keeps the size
and sets the other time back goes unseen. Small plans are hashed each time.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from trt_wan.engines.store.files import keep, read_json

LARGE = 64 << 20  # bytes; hashing fewer takes less than 50 ms
SETTLED = 2.0  # s; times are that coarse on some disks, so a later change could look the same


def has_hash(file: BufferedReader, sha256: str, memory: Path) -> bool:
    """Whether `file`, open for reading and at its beginning, has that hash; rewinds it. `memory` is the file
    of the record.
    """
    # Taken before reading, so that a change meanwhile shows later.
    now, found = time.time_ns(), os.fstat(file.fileno())
    state = [*_state(found), sha256]
    large = found.st_size >= LARGE
    if large and read_json(memory) == state:
        return True
    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
        return False
    file.seek(0)
    if large and now - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED * 1e9:
        keep(memory, json.dumps(state))
    return True


CHUNK = 8 << 20  # bytes read between two looks at `should_stop`


def file_state(path: Path) -> list[int]:
    """Size, inode and times of a file: they differ once it was written to or replaced. Raises OSError."""
    return _state(os.stat(path))


def known_hash(path: Path, memory: Path) -> str | None:
    """Returns the sha256 of `path` if `memory` has it for the file's present state. Raises OSError."""
    match read_json(memory):
        case [*state, str(sha256)] if state == file_state(path):
            return sha256
    return None


def content_hash(path: Path, state: list[int], memory: Path, should_stop: Callable[[], bool]) -> str | None:
    """Returns the sha256 of `path` and remembers it; None if stopped, or if the file left `state`.

    Raises OSError.
    """
    digest, now = hashlib.sha256(), time.time_ns()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if should_stop():
                return None
            digest.update(chunk)
        if _state(os.fstat(file.fileno())) != state:
            return None
    if now - max(state[2:]) > SETTLED * 1e9:
        keep(memory, json.dumps([*state, digest.hexdigest()]))
    return digest.hexdigest()


def _state(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
