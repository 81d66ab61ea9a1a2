"""Frames in shared memory: uint8, [T, H, W, C] or [T, H, W]. One process makes a block and frees it; the
other copies the frames out.
"""

import math
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import MemoryShort
from trt_wan.runtime.closing import Closing

Pixels = NDArray[np.uint8]
SHM = Path("/dev/shm")  # Linux keeps shared memory here


@dataclass(frozen=True)
class Frames:
    """The frames of a block, as the other process finds them."""

    name: str
    shape: tuple[int, ...]

    def copied(self) -> Pixels:
        memory = _attached(self.name)
        try:
            return np.array(np.ndarray(self.shape, np.uint8, buffer=memory.buf))
        finally:
            memory.close()


class Block(Closing):
    """`frames` are copied one by one. Raises MemoryShort where they do not fit; writing would kill the
    process by SIGBUS.
    """

    def __init__(self, shape: tuple[int, ...], frames: Iterable[Pixels]) -> None:
        size = max(math.prod(shape), 1)
        try:
            self._memory = SharedMemory(create=True, size=size)
        except OSError as error:
            raise _short(size) from error
        try:
            _allocate(self._memory)
            _fill(self._memory, shape, frames)
        except BaseException:
            self.close()
            raise
        self.frames = Frames(self._memory.name, shape)

    def close(self) -> None:
        self._memory.close()
        self._memory.unlink()


def _fill(memory: SharedMemory, shape: tuple[int, ...], frames: Iterable[Pixels]) -> None:
    for k, frame in enumerate(frames):
        # No name holds the view: an exception would keep it, and the block could not be closed.
        np.ndarray(shape, np.uint8, buffer=memory.buf)[k] = frame


def _allocate(memory: SharedMemory) -> None:
    file = SHM / memory.name
    if hasattr(os, "posix_fallocate") and file.exists():
        try:
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, memory.size)
        except OSError as error:
            raise _short(memory.size) from error


def _short(size: int) -> MemoryShort:
    has = f", and {SHM} has {shutil.disk_usage(SHM).free / 1e9:.2f} GB" if SHM.exists() else ""
    return MemoryShort(
        f"The frames need {size / 1e9:.2f} GB of shared memory{has}.",
        f"Make {SHM} larger (a container's --shm-size), or use fewer or smaller frames.",
    )


def _attached(name: str) -> SharedMemory:
    if sys.version_info >= (3, 13):
        return SharedMemory(name=name, track=False)
    memory = SharedMemory(name=name)
    if os.name == "posix":
        # Before 3.13 a process also frees at its end the blocks of others (python/cpython#82300).
        resource_tracker.unregister(f"/{memory.name}", "shared_memory")
    return memory
