"""The state of an unfinished video, beside its partial file, from which a later process goes on.

    out.partial.mp4.state/state.json      the record of the run, the end of the partial file, the name of the
                                          state's file, and a checksum of these
    out.partial.mp4.state/windows-3.npz   the state after three windows (window_state.py)

After each window the new state is written under a name of its own and synced, then state.json is replaced,
then the old state goes. A kill or a power failure at any moment leaves one that is whole.
"""

import dataclasses
import hashlib
import io
import json
import shutil
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.store.files import replace_atomically
from trt_wan.engines.store.locks import held
from trt_wan.errors import InputError, OutputError, UsageError, shown
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.kept.record import Record, from_values, read_record, sidecar_of
from trt_wan.runtime.video.container import measure
from trt_wan.runtime.video.kinds import KINDS
from trt_wan.runtime.video.target import beside, explained, lock_of, redo_folder
from trt_wan.runtime.video.working_file import Settled, beginning
from trt_wan.runtime.window_state import WindowState

FORMAT = 1
STATE = ".state"  # added to the name of a partial file
INDEX, CHECKSUM = "state.json", "sha256"
ANEW = "Leave out --resume: then the video begins anew, and what was kept stays."
MOST_TOLD = 4  # differences in a message
# Raised by numpy and zipfile for a file that is no .npz, or that lacks an array.
UNREADABLE = (
    *(OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclass(frozen=True)
class Kept:
    """The end of the partial file, and the state there."""

    settled: Settled
    state: WindowState


def folder_of(partial: Path) -> Path:
    return partial.with_name(partial.name + STATE)


def save(partial: Path, record: Record, settled: Settled, state: WindowState) -> None:
    """Keeps the state after a window. Raises OutputError; the state before stays then."""
    folder = folder_of(partial)
    arrays = dict(_packed(state, "state"))
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    data = buffer.getvalue()
    name = f"windows-{state.done}.npz"
    values = {
        "format": FORMAT,
        "record": json.loads(record.text(with_paths=True)),
        "video": dataclasses.asdict(settled),
        "windows": {"done": state.done, "file": name, "sha256": hashlib.sha256(data).hexdigest()},
    }
    with explained(partial):
        replace_atomically(folder / name, data, sync=True)
        replace_atomically(folder / INDEX, index_text(values), sync=True)
        for old in folder.iterdir():
            if old.name not in (name, INDEX):
                old.unlink(missing_ok=True)


def index_text(values: Mapping[str, Any]) -> str:
    """state.json: `values` and their checksum."""
    return json.dumps({**values, CHECKSUM: _checksum(values)}, ensure_ascii=False)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def remove(partial: Path) -> None:
    """Call when the video is finished."""
    shutil.rmtree(folder_of(partial), ignore_errors=True)


def kept_of(output: Path) -> list[Path]:
    """The folders of whole states beside `output`."""
    return [path for path in beside(output, STATE) if (path / INDEX).is_file()]


def finished_part(output: Path) -> tuple[Path, int] | None:
    """The partial file of `output` and its bytes up to the last finished window, which play. None: no window
    is finished.
    """
    for folder in kept_of(output):
        with suppress(OutputError, InputError):
            return _partial_of(folder), _read_index(folder).settled.size
    return None


def forget_finished(output: Path) -> None:
    """Removes the remains of a process that was killed after it gave the video `output` its name: the lock,
    and the state after its last window. Where another process has the lock, nothing is touched.
    """
    place = output.resolve()
    lock, folders = lock_of(place), kept_of(output)
    if not place.is_file() or not (lock.exists() or folders):
        return
    with suppress(OSError), held(lock, wait=False) as ours:
        if ours:
            for folder in folders:
                if _is_finished(place, folder):
                    _partial_of(folder).unlink(missing_ok=True)
                    shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(redo_folder(place), ignore_errors=True)
            lock.unlink(missing_ok=True)


def _is_finished(video: Path, folder: Path) -> bool:
    """Whether `video` has all that this state could go on with."""
    try:
        index = _read_index(folder)
        if index.record.text(with_paths=False) != _record_of(video).text(with_paths=False):
            return False
        return not _partial_of(folder).exists() or index.settled.pictures == len(measure(video).used)
    except (OutputError, InputError):
        return False


def _record_of(video: Path) -> Record:
    """A GIF's is only in the file beside it."""
    kind = KINDS.get(video.suffix.lower())
    return read_record(sidecar_of(video) if kind and kind.is_gif else video)


def forget_begun(output: Path, record: Record, window: int, progress: Progress) -> None:
    """Removes partial files of this very job that have no finished window: at most the `window` frames of the
    first, and no state. Call before a job that was to go on from them begins anew.
    """
    for partial in beside(output):
        if (folder_of(partial) / INDEX).exists():
            continue
        with suppress(InputError, OSError):
            if len(measure(partial).used) <= window and not read_record(partial).differences(record):
                partial.unlink()
                text = f"{partial.name} had no finished window of this job and is replaced."
                progress(Note(text, "replaced_partial", {"file": str(partial)}))


def _partial_of(folder: Path) -> Path:
    return folder.with_name(folder.name.removesuffix(STATE))


def find(output: Path, record: Record, progress: Progress) -> Kept | None:
    """The state of this very job with most windows; None and a note if nothing was kept.

    Raises UsageError if what was kept is of another job, and names the differences; OutputError if it is
    damaged, incomplete or of a newer version.
    """
    folders = kept_of(output)
    if not folders:
        progress(Note("Nothing was kept to go on from: the video begins at its first frame.", "kept_nothing"))
        return None
    found = []
    refused: list[OutputError | UsageError] = []
    for folder in folders:
        try:
            index = _read_index(folder)
            _require_same(folder, index.record, record)
            found.append((index.done, folder, index))
        except (OutputError, UsageError) as error:
            refused.append(error)
    if not found:
        raise refused[-1]
    done, folder, index = max(found, key=lambda item: item[0])
    state = _read_state(folder, index)
    partial = _partial_of(folder)
    _require_partial(partial, folder, index.settled)
    if others := index.record.other_versions(record):
        text = f"{partial.name} was begun with {', '.join(others)}: bits may differ."
        progress(Note(text, "other_versions", {"versions": others}))
    text = f"Going on after window {done}: {index.settled.pictures} frames are in {partial.name}."
    progress(Note(text, "resumed", {"windows": done, "frames": index.settled.pictures, "file": str(partial)}))
    return Kept(index.settled, state)


@dataclass(frozen=True)
class _Index:
    record: Record
    settled: Settled
    done: int
    file: str
    sha256: str


def _read_index(folder: Path) -> _Index:
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if isinstance(values["format"], int) and values["format"] > FORMAT:
            raise OutputError(f"{folder} was kept by a newer trt-wan.", f"Update trt-wan. {ANEW}")
        if values.pop(CHECKSUM) != _checksum(values):
            raise ValueError
        windows, record = values["windows"], from_values(values["record"])
        settled = Settled(**values["video"])
        index = _Index(record or _missing(), settled, windows["done"], windows["file"], windows["sha256"])
        for made in (index, settled):
            _require_types(made)
        if values["format"] != FORMAT or Path(index.file).name != index.file:
            raise ValueError
        if settled.name != folder.name.removesuffix(STATE):
            raise _damaged(folder, f"it is that of {shown(settled.name)}")
        return index
    except OutputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, f"its {INDEX} cannot be read") from error


def _missing() -> Record:
    raise ValueError("no record")


def _require_types(made: Any) -> None:
    for name, kind in get_type_hints(type(made)).items():
        if not isinstance(getattr(made, name), kind) or isinstance(getattr(made, name), bool) != (
            kind is bool
        ):
            raise ValueError(name)


def _require_same(folder: Path, before: Record, now: Record) -> None:
    if differences := before.differences(now):
        told = "; ".join(difference.text for difference in differences[:MOST_TOLD])
        more = f"; and {len(differences) - MOST_TOLD} more" if len(differences) > MOST_TOLD else ""
        raise UsageError(
            f"{folder.name.removesuffix(STATE)} is of another job: {told}{more}.",
            f"Go on with the settings and files that it was begun with. {ANEW}",
        )


def _require_partial(partial: Path, folder: Path, settled: Settled) -> None:
    if not partial.is_file():
        raise OutputError(
            f"{folder.name} goes on from {partial}, which is not there.", f"Move it back. {ANEW}"
        )
    with explained(partial):
        digest = beginning(partial, settled.size)
        whole = partial.stat().st_size >= settled.size
    if not whole or digest.hexdigest() != settled.sha256:
        fault = "has been changed" if whole else "is shorter than it was"
        raise OutputError(f"{partial} {fault}, so nothing can go on from it.", ANEW)


def _read_state(folder: Path, index: _Index) -> WindowState:
    try:
        data = (folder / index.file).read_bytes()
        if hashlib.sha256(data).hexdigest() != index.sha256:
            raise ValueError
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            state: WindowState = _unpacked(WindowState, dict(arrays), "state")
    except UNREADABLE as error:
        raise _damaged(folder, f"{shown(index.file)} is missing or not what was written") from error
    return state


def _damaged(folder: Path, why: str) -> OutputError:
    return OutputError(f"{folder} is damaged: {why}.", ANEW)


def _packed(value: Any, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of a dataclass of arrays, numbers, texts, None and such dataclasses."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _packed(getattr(value, field.name), f"{name}.{field.name}")
    elif value is not None:
        assert isinstance(value, np.ndarray | bool | int | float | str), f"{name} is a {type(value)}"
        yield name, np.asarray(value)


def _unpacked(kind: Any, arrays: dict[str, NDArray[Any]], name: str) -> Any:
    """Raises KeyError for a value that is missing."""
    if isinstance(kind, types.UnionType):
        if not any(key == name or key.startswith(f"{name}.") for key in arrays):
            return None
        (kind,) = [kind for kind in get_args(kind) if kind is not types.NoneType]
    if dataclasses.is_dataclass(kind):
        make: Callable[..., Any] = kind  # type: ignore[assignment]
        hints = get_type_hints(kind)
        return make(**{part: _unpacked(hint, arrays, f"{name}.{part}") for part, hint in hints.items()})
    value = arrays[name]
    return kind(value.item()) if kind in (bool, int, float, str) else value
