"""Everything in $TRT_WAN_HOME beside the engines, in rows with a name and a size, and its removal.

Every file belongs to one engine (entries.py) or to one row. The row `leftovers` has files that killed
processes left, and files in place of folders. `unfinished` has those that a process is making, which stay.
`unknown` has those that trt-wan did not make, which it never removes.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.store.files import PARTIAL
from trt_wan.engines.store.graphs import read_manifest
from trt_wan.engines.store.home import home
from trt_wan.engines.store.locks import forget_locks, held, is_held
from trt_wan.engines.store.manifest import FILE, lock_of
from trt_wan.errors import shell_command

# By folder, the content and the command or moment that makes it again.
ABOUT = {
    "kernels": "kernels compiled for a GPU; the next run",
    "measurements": "measured candidates; trt-wan build",
    "timings": "TensorRT's measurements; the next build",
    "step_cache": "ratios of the step cache; trt-wan bench calibrate-cache",
    "onnx": "hashes of ONNX files; the next use of a file",
    "text": "encoded prompts; the next run",
    "weights": "the demo's random weights; trt-wan demo",
}
GRAPHS, LOCKS, LEFTOVERS, WORK, UNKNOWN = "graphs", "locks", "leftovers", "unfinished", "unknown"
STAY = {  # not removed
    WORK: "files that a process is making",
    UNKNOWN: "files that trt-wan did not make",
}
OTHERS = {
    LOCKS: "locks between processes; the next build",
    LEFTOVERS: "parts that stopped processes left; nothing needs them",
    **STAY,
}
NAMES = (GRAPHS, *ABOUT, LOCKS, LEFTOVERS)  # for `trt-wan rm`, beside keys and sets of graphs
MAKING = ".making-"  # how the folders begin in which clips are made
PLACES_OF_LOCKS = ("engines/locks", "graphs", "measurements")
UNTOUCHED = 600.0  # s; a part outside engines and graphs that is that old is no longer being made


@dataclass(frozen=True)
class Folder:
    """A row. Sets of graphs are named graphs/<set>."""

    name: str
    about: str
    files: int
    bytes: int


def folders() -> list[Folder]:
    """Every row that has files; sets of graphs come first."""
    sizes: dict[str, list[int]] = {}
    for path, owner in _owned():
        with suppress(OSError):  # removed meanwhile by another process
            sizes.setdefault(owner, []).append(path.lstat().st_size)
    order = [*sorted(name for name in sizes if name.startswith(f"{GRAPHS}/")), *ABOUT, *OTHERS]
    return [Folder(name, _about(name), len(sizes[name]), sum(sizes[name])) for name in order if name in sizes]


def files_of(name: str) -> list[Path]:
    """The files of a row, sorted."""
    return sorted(path for path, owner in _owned() if owner == name)


def graphs_of(name: str) -> Path:
    """The folder of a set of graphs."""
    return home() / name


def clear(name: str) -> bool:
    """Removes the files of a row. False if files stay that another process is making."""
    match name:
        case "locks":
            for place in PLACES_OF_LOCKS:
                forget_locks(home() / place)
            return True
        case "leftovers":
            forget_leftovers(home())
            return True
        case _ if name in ABOUT:
            shutil.rmtree(home() / name, ignore_errors=True)
            return not files_of(name)
    assert name.startswith(f"{GRAPHS}/"), name
    return _removed(graphs_of(name))


def forget_leftovers(below: Path) -> None:
    """Removes files and folders below a folder that stopped processes left, and files in place of folders."""
    for path, owner in _owned():
        if owner == LEFTOVERS and path.is_relative_to(below):
            with suppress(OSError):
                path.unlink(missing_ok=True)
                for folder in path.parents:  # the folder that was being made
                    if not _is_part(folder.name):
                        break
                    folder.rmdir()


def _removed(graphs: Path) -> bool:
    """Removes one folder of graphs with its lock."""
    lock = graphs.with_name(f"{graphs.name}.lock")
    with held(lock, wait=False) as ours:
        if ours:
            shutil.rmtree(graphs, ignore_errors=True)
            with suppress(OSError):
                lock.unlink(missing_ok=True)
    return ours


def _owned() -> Iterator[tuple[Path, str]]:
    """Every file with the name of its row; engines are left out."""
    with suppress(OSError):
        for top in sorted(home().iterdir()):
            if not top.is_dir():
                yield top, _owner((top.name,), top)
            for folder, _, names in os.walk(top):  # a folder may be a link to another disk
                for name in names:
                    path = Path(folder, name)
                    if owner := _owner(path.relative_to(home()).parts, path):
                        yield path, owner


def _owner(parts: tuple[str, ...], path: Path) -> str:
    top, name = parts[0], parts[-1]
    ours = top in ("engines", GRAPHS, *ABOUT)
    if any(map(_is_part, parts)):
        return WORK if _in_work(parts, path) else LEFTOVERS
    if not ours:
        return UNKNOWN
    if len(parts) == 1:
        return LEFTOVERS  # a file in place of a folder
    if name.endswith(".lock"):
        return LOCKS
    if top == "engines":
        return "" if FILE.fullmatch(name) and len(parts) == 2 else UNKNOWN
    if top == GRAPHS:
        return f"{GRAPHS}/{parts[1]}" if len(parts) > 2 else UNKNOWN
    return top


def _is_part(name: str) -> bool:
    return name.endswith(PARTIAL) or name.startswith(MAKING)


def _in_work(parts: tuple[str, ...], path: Path) -> bool:
    match parts:
        case ("engines", name):
            return is_held(lock_of(name.partition(".")[0]))
        case ("graphs", graphs, *_):
            return is_held(home() / GRAPHS / f"{graphs.removesuffix(PARTIAL)}.lock")
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime < UNTOUCHED
    return False


def _about(name: str) -> str:
    if not name.startswith(f"{GRAPHS}/"):
        return ABOUT.get(name) or OTHERS[name]
    manifest = read_manifest(graphs_of(name))
    finished = sum(graph in manifest.sha256 for graph in manifest.names)
    state = "" if finished == len(manifest.names) else f", {finished} of {len(manifest.names)} graphs"
    again = shell_command(manifest.command or ("build",))
    return f"{manifest.title or 'graphs without a manifest'}{state}; {again}"
