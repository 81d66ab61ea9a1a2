"""The folders in $TRT_WAN_HOME beside the engines: their sizes, and their removal."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.store.home import home
from trt_wan.engines.store.locks import forget_locks, held

# By name, the content and the command or moment that makes it again.
ABOUT = {
    "graphs": "exported graphs; trt-wan build",
    "kernels": "kernels compiled for a GPU; the next run",
    "measurements": "measured candidates; trt-wan build",
    "timings": "TensorRT's measurements; the next build",
    "onnx": "hashes of ONNX files; the next use of a file",
    "text": "encoded prompts; the next run",
    "weights": "the demo's random weights; trt-wan demo",
    "locks": "locks of engines; the next build",
}


@dataclass(frozen=True)
class Folder:
    name: str
    about: str
    files: int
    bytes: int


def path_of(name: str) -> Path:
    return home() / ("engines/locks" if name == "locks" else name)


def folders() -> list[Folder]:
    """Every folder that holds files."""
    found = []
    for name, about in ABOUT.items():
        sizes = list(_sizes(path_of(name)))
        if sizes:
            found.append(Folder(name, about, len(sizes), sum(sizes)))
    return found


def clear(name: str) -> bool:
    """Empties a folder. False if files stay that another process is making."""
    folder = path_of(name)
    if name == "graphs":
        done = all([_removed(path) for path in folder.glob("*") if path.suffix != ".lock"])
        forget_locks(folder)
        return done
    if name == "locks":
        forget_locks(folder)
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists() or not any(_sizes(folder))


def _removed(graphs: Path) -> bool:
    """Removes one folder of graphs with its lock."""
    lock = graphs.with_name(f"{graphs.name.removesuffix('.partial')}.lock")
    with held(lock, wait=False) as ours:
        if ours:
            shutil.rmtree(graphs, ignore_errors=True)
            with suppress(OSError):
                lock.unlink(missing_ok=True)
    return ours


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # removed meanwhile by another process
            if path.is_file():
                yield path.stat().st_size
