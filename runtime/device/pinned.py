"""Page-locked host memory: small pieces for copies that come and go, and large ones that stay."""

import ctypes
import mmap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import MemoryShort
from trt_wan.runtime.device.checked import cuda, cuda_core

HUGE_PAGE, PAGE = 2 << 20, 4096
CGROUP = Path("/sys/fs/cgroup")
# Shared memory, the default, has no huge pages. Windows knows no flags.
PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
MARGIN = 1 << 30  # bytes of host memory that are left to everything else
PORTABLE = 1  # cudaHostRegisterPortable: every context may use the memory


class Pinned:
    """A piece that one copy at a time reads or writes. Getting one takes about a second per GB."""

    def __init__(self, size: int) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        with cuda_core():
            self._buffer = LegacyPinnedMemoryResource().allocate(size)
        self.address = int(self._buffer.handle)
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * size).from_address(self.address)
        )
        self._event: Any = None

    def used_by(self, stream: Any) -> None:
        """Call after the copy has been enqueued on `stream`."""
        self._event = stream.record()

    def wait(self) -> None:
        """Returns when the last copy is done."""
        if self._event is not None:
            with cuda_core():
                self._event.sync()
            self._event = None

    def close(self) -> None:
        self._buffer.close()


class Ring:
    """`slots` pieces of `size` bytes in turn. Write the one taken, enqueue its copy and call `used_by`."""

    def __init__(self, slots: int, size: int, make: Callable[[int], Pinned] = Pinned) -> None:
        self.size = size
        self._slots = [make(size) for _ in range(slots)]
        self._turn = -1

    def __len__(self) -> int:
        return len(self._slots)

    def take(self) -> tuple[int, Pinned]:
        """The slot that was used longest ago, and its number. Waits for the slot's last copy."""
        self._turn = (self._turn + 1) % len(self._slots)
        slot = self._slots[self._turn]
        slot.wait()
        return self._turn, slot

    def close(self) -> None:
        """Call when no copy is under way."""
        for slot in self._slots:
            slot.close()


class PageLocked:
    """`size` bytes in one piece that stay page-locked until `close`, on huge pages where the system has them.

    The pages are touched first and locked afterwards: four times as fast as cudaHostAlloc, and several
    threads can do it at once. Raises MemoryShort.
    """

    def __init__(self, size: int) -> None:
        from cuda.bindings import runtime

        try:
            self._map = mmap.mmap(-1, size + HUGE_PAGE, **PRIVATE)
        except (OSError, ValueError) as error:
            raise _short(size) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._whole: Any = np.frombuffer(self._map, np.uint8)
        start = -self._whole.ctypes.data % HUGE_PAGE
        self.bytes: Any = self._whole[start : start + size]
        self.bytes[::PAGE] = 0
        self.address, self.size = int(self.bytes.ctypes.data), size
        try:
            cuda(runtime.cudaHostRegister(self.address, size, PORTABLE))
        except MemoryShort as error:
            raise _short(size) from error

    def close(self) -> None:
        """Call when no copy is under way."""
        from cuda.bindings import runtime

        cuda(runtime.cudaHostUnregister(self.address))
        self.bytes = self._whole = None
        self._map.close()


def require_host_memory(size: int) -> None:
    """Raises MemoryShort unless `size` bytes of memory can be page-locked here."""
    import psutil

    free = min(int(psutil.virtual_memory().available), *_cgroup_rooms())
    if size > free - MARGIN:
        raise MemoryShort(
            f"The weights that stream take {size / 1e9:.1f} GB of page-locked host memory; "
            f"{free / 1e9:.1f} GB are free.",
            "Raise --vram so that more weights stay on the GPU, or close other programs.",
        )


def _cgroup_rooms(root: Path = CGROUP, own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each control group of this process (container, service) still allows it.

    A group's count includes cached files, which go when memory is needed.
    """
    rooms = [_room(root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")]  # version 1
    with suppress(OSError):
        for line in own.read_text().splitlines():
            path = PurePosixPath(line.rpartition(":")[2])
            for name in (path, *path.parents) if line.startswith("0::") else ():
                rooms.append(_room(root / str(name).lstrip("/"), "memory.max", "memory.current"))
    return rooms


def _room(group: Path, limit: str, usage: str) -> int:
    """Bytes left in one control group; a huge number where the group has no limit."""
    with suppress(OSError, ValueError):
        statistics = (group / "memory.stat").read_text().split()
        files = dict(zip(statistics[::2], statistics[1::2], strict=True))
        cached = sum(int(files.get(f"{state}_file", 0)) for state in ("active", "inactive"))
        return int((group / limit).read_text()) - int((group / usage).read_text()) + cached
    return 1 << 62


def _short(size: int) -> MemoryShort:
    return MemoryShort(
        f"{size / 1e9:.2f} GB of host memory could not be page-locked for the weights that stream.",
        "Raise --vram so that more weights stay on the GPU, or close other programs.",
    )
