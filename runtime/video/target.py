"""The place of the finished video: checks before the work, names of unfinished files, a lock on the output.

While a job runs, its video grows as `<stem>.partial<suffix>`. One that was kept from an earlier run stays:
the next is `<stem>.partial-2<suffix>`, and so on.
"""

import errno
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import av

from trt_wan.engines.store.files import can_make
from trt_wan.engines.store.locks import held
from trt_wan.errors import OutputError, UsageError, with_commands
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.pieces import has_no_piece
from trt_wan.runtime.video.working_file import PROBE


def check_target(path: Path, overwrite: bool) -> None:
    """Raises UsageError or OutputError if a video cannot be written to `path`."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(
            f"{path} ends in {path.suffix or 'nothing'}, which is not a video that can be written.",
            f"Use one of: {', '.join(KINDS)}.",
        )
    if not path.parent.is_dir():
        hint = "It cannot be made there: choose a folder that you can write to."
        if can_make(path.parent):
            hint = with_commands("Make it:", f"mkdir -p {shlex.quote(str(path.parent))}")
        raise OutputError(f"There is no folder {path.parent}.", hint)
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", "Give the name of a file.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already.", "Choose another name, or add -y to replace it.")


def require_audible(path: Path) -> None:
    """Raises UsageError for a kind of file that has no sound."""
    if KINDS[path.suffix.lower()].is_gif:
        raise UsageError(
            "A GIF has no sound, so --audio would do nothing.", "Leave it out, or write an .mp4."
        )


def refuse_inputs(output: Path, inputs: Iterable[Path | None]) -> None:
    """Raises UsageError if `output` is one of the files `inputs`, or a file in one of the folders `inputs`,
    also through links. Videos in folders do not count: the folders are those of checkpoints.
    """
    if not output.exists():
        return
    there = output.stat()
    for path in inputs:
        files = [] if path is None else [path]
        if path is not None and path.is_dir():
            files = [file for file in path.rglob("*") if file.suffix.lower() not in KINDS]
        for file in files:
            with suppress(OSError):
                if os.path.samestat(there, file.stat()):
                    raise UsageError(
                        f"{output} is an input of this job ({file}) and would be overwritten.",
                        "Choose another output.",
                    )


@contextmanager
def claimed(output: Path, progress: Progress = silent) -> Iterator[None]:
    """Keeps `output`, a file or a folder, for this process. Raises OutputError if another process has it.

    Tells of files that were kept from earlier runs, and removes those of killed runs that hold nothing. Calls
    may be nested. The operating system releases the lock of a process that is killed.
    """
    place = output.resolve()
    if not place.name:
        raise OutputError(f"{output} cannot be replaced.", "Name a folder or a file in it.")
    if place in _ours:
        yield
        return
    with ExitStack() as stack:
        with explained(output):
            for folder in reversed(missing_parents(place.parent)):
                stack.callback(_quietly, folder.rmdir)
            lock = lock_of(place)
            if not stack.enter_context(held(lock, wait=False)):
                raise OutputError(
                    f"Another run is writing {output}.", "Wait until it has ended, or choose another output."
                )
            stack.callback(_quietly, lock.unlink)
            _ours.add(place)
            stack.callback(_ours.remove, place)
            kept = _kept(place) if place.suffix.lower() in KINDS else []
        if kept:
            names = [str(path if output.is_symlink() else output.with_name(path.name)) for path in kept]
            text = f"Kept from an earlier run, and left alone: {', '.join(names)}."
            progress(Note(text, "kept_partial", {"files": names}))
        yield


_ours: set[Path] = set()  # the outputs of this process


def partial_names(path: Path) -> Iterator[Path]:
    """Names beside `path`, or beside the file that `path` links to: a rename replaces that file."""
    place = path.resolve() if path.is_symlink() else path
    for number in count(1):
        suffix = working_suffix(place)
        yield place.with_name(f"{place.stem}.partial{f'-{number}' if number > 1 else ''}{suffix}")


def beside(output: Path, more: str = "") -> list[Path]:
    """The partial files of `output` that are there, or the paths named like one with `more` behind it."""
    place = output.resolve()
    pattern = re.compile(rf"{re.escape(place.stem)}\.partial(-\d+)?{re.escape(working_suffix(place) + more)}")
    if not place.parent.is_dir():
        return []
    return sorted(path for path in place.parent.iterdir() if pattern.fullmatch(path.name))


def lock_of(place: Path) -> Path:
    """The lock of the video `place`, a resolved path."""
    return place.with_name(f".{place.name}.lock")


def redo_folder(place: Path) -> Path:
    """The folder in which the parts of the video `place`, a resolved path, are made (redo.py)."""
    return place.with_name(f".{place.name}.redo")


def joining(partial: Path) -> Path:
    """The name of the final video while it is made of `partial`."""
    return partial.with_name(f".{partial.stem}.joining{partial.suffix}")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the disk and of ffmpeg become OutputErrors about `path`."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise _output_error(path, error) from error


def sync(path: Path) -> None:
    """Flushes a file to the disk. Windows does so only if it is open for writing."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def missing_parents(path: Path) -> list[Path]:
    """The folders that have to be made for the folder `path`, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _kept(place: Path) -> list[Path]:
    """Partial files that hold something. The others are of killed runs, for the lock is ours, and go."""
    kept = []
    shutil.rmtree(redo_folder(place), ignore_errors=True)
    for path in beside(place):
        _quietly(joining(path).unlink)
        if path.stat().st_size <= PROBE and has_no_piece(path.read_bytes()):
            _quietly(path.unlink)
        else:
            kept.append(path)
    return kept


def working_suffix(place: Path) -> str:
    """The ending of the partial files of the video `place`."""
    kind = KINDS.get(place.suffix.lower())
    return ".mp4" if kind and kind.is_gif else place.suffix


def _quietly(act: Callable[[], object]) -> None:
    with suppress(OSError):
        act()


def _output_error(path: Path, error: OSError | av.FFmpegError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free // 2**20
        return OutputError(
            f"The disk is full: {path} cannot be written ({free} MB are free in {path.parent}).",
            "Free some space, or write to another disk.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            f"The folder {path.parent} cannot be written to.", "Choose a folder that you can write to."
        )
    return OutputError(
        f"{path} cannot be written ({error.strerror}).", "Check the disk, or write to another one."
    )
