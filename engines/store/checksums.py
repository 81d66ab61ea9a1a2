"""Whether a plan has the hash that its manifest names, without reading a gigabyte each time.

Once a large plan has passed, what the file system says of the file is remembered beside it: size, inode and
the times of its last writing and last change. A file that was written to, replaced, swapped or cut differs in
one of them: on POSIX the time of the last change cannot be set back. On Windows there is no such time, and an
edit that keeps the size and sets the other time back goes unseen. Small plans are hashed each time.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from trt_wan.engines.store.files import keep

LARGE = 64 << 20  # bytes; hashing fewer takes less than 50 ms
SETTLED = 2.0  # s since the last change: times are that coarse on some disks, so one more could look the same


def has_hash(file: BufferedReader, sha256: str, memory: Path) -> bool:
    """`file` is open for reading, and is at its beginning afterwards; `memory` is where it is remembered."""
    now, found = time.time_ns(), os.fstat(file.fileno())  # before it is read: a change meanwhile shows later
    state = [*_state(found), sha256]
    large = found.st_size >= LARGE
    if large and _remembered(memory) == state:
        return True
    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
        return False
    file.seek(0)
    if large and now - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED * 1e9:
        keep(memory, json.dumps(state))
    return True


def _remembered(memory: Path) -> object:
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError):  # not there, or damaged: hashed again
        return None


CHUNK = 8 << 20  # bytes read between two looks at `should_stop`


def file_state(path: Path) -> list[int]:
    """Size, inode and times of a file: they differ once it was written to or replaced. Raises OSError."""
    return _state(os.stat(path))


def known_hash(path: Path, memory: Path) -> str | None:
    """Returns the sha256 of `path` if `memory` has it for the file's present state. Raises OSError."""
    match _remembered(memory):
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
