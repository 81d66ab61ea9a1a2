"""A block of GPU memory on every rank of one host, which all ranks write: CUDA IPC, and copies over NVLink
or PCIe by the copy engines. Streams wait for each other's flags, so the host never waits.

Flags lie in host memory that all processes have mapped. This costs a few microseconds a wait, and when a
rank is lost any thread ends all waits with a plain store: a CUDA call could not, while the queue of its
stream is full. CUDA documents memory operations of streams for registered host memory, not for another
process's GPU memory.
"""

import ctypes
import mmap
import os
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import EnvironmentBroken, GpuFault, TrtWanError
from trt_wan.runtime.device.checked import OUT_OF_MEMORY, cuda
from trt_wan.runtime.device.gpu import MOST_BLOCKS, Gpu
from trt_wan.runtime.device.kernels import Module, read_source
from trt_wan.runtime.parallel.ranks import Ranks

SOURCE = read_source(__package__, "flags.cu", "beside.cu")
NAMES = ("set_flag", "wait_flag", "beside")
SHARED = Path("/dev/shm")  # memory as files; CUDA registers no pages of a disk
LINE = 128  # bytes from flag to flag: no two in a cache line
PIECE = 2 << 20  # CUDA exports memory in such pieces: a smaller block would share its neighbours too
VECTOR = 16  # bytes that a thread copies
ENDED = 0x7FFF_FFFF  # at least any value that is waited for
HANDLE_BYTES = 64  # the size of a cudaIpcMemHandle_t
PROBE_SECONDS = 5.0
ONE_GPU = "Leave --gpus out to use one GPU."


@dataclass(frozen=True)
class Pieces:
    """Channels that go beside each other into rows. In every `share` rows those from `filled` on are padding.
    Other numbers are bytes, multiples of VECTOR.
    """

    rows: int
    share: int
    filled: int
    count: int
    width: int  # a row of a piece
    step: int  # from where a piece goes in a row to where the next one does
    first: int  # where the first one goes
    whole: int  # the width of the rows, behind which channels are dropped

    @property
    def numbers(self) -> tuple[int, ...]:
        """Arguments of the kernel."""
        in_vectors = (size // VECTOR for size in (self.width, self.step, self.first, self.whole))
        return self.rows, self.share, self.filled, self.count, *in_vectors


class PeerMemory:
    """`size` bytes on every rank, 0 at first, and `flags` numbers for it to wait for, 0 at first.

    All ranks make theirs at the same time. Raises EnvironmentBroken where the GPUs cannot reach each other's
    memory, MemoryShort, and RankLost. `kernels` makes flags work by kernels even where streams have memory
    operations, for tests.
    """

    def __init__(self, gpu: Gpu, ranks: Ranks, size: int, flags: int, *, kernels: bool = False) -> None:
        self._gpu, self._rank = gpu, ranks.rank
        self._module = gpu.once(SOURCE, lambda: Module(gpu.device, SOURCE, NAMES))
        self.size = size
        self._closed, self._lost = threading.Event(), threading.Event()
        self._watch: threading.Thread | None = None
        self._blocks: dict[int, int] = {}
        self._pitch = flags * LINE
        pages = _shared_pages(ranks, ranks.count * self._pitch)
        self._whole: NDArray[np.uint32] | None = np.frombuffer(pages, np.uint32)
        self._own = self._whole[self._rank * self._pitch // 4 :: LINE // 4][:flags]
        try:
            self._flags = _registered(self._whole)
            self._by_kernels = kernels or not self._streams_signal()
            if self._by_kernels and not self._works():
                raise _no_flags()
            self._own[0] = 0
            self._take(ranks, size)
        except BaseException:
            self.close()
            raise

    @property
    def by_kernels(self) -> bool:
        """Whether flags are set and waited for by kernels."""
        return self._by_kernels

    def address(self, rank: int) -> int:
        """The address of that rank's block, valid in this process."""
        return self._blocks[rank]

    def copy(
        self, target: tuple[int, int], source: tuple[int, int], width: int, height: int, stream: Any
    ) -> None:
        """Enqueues the copy of `height` runs of `width` bytes. `target` and `source` are an address, in any
        rank's block or on this GPU, and the bytes from a run to the next.
        """
        from cuda.bindings import runtime

        if width and height:
            kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
            cuda(runtime.cudaMemcpy2DAsync(*target, *source, width, height, kind, int(stream.handle)))

    def clear(self, target: tuple[int, int], width: int, height: int, stream: Any) -> None:
        """Enqueues zeros for `height` runs of `width` bytes on this GPU."""
        from cuda.bindings import runtime

        if width and height:
            cuda(runtime.cudaMemset2DAsync(*target, 0, width, height, int(stream.handle)))

    def lay_beside(self, out: int, address: int, pieces: Pieces) -> None:
        """Enqueues the kernel of beside.cu on the compute stream: from the pieces at `address`, of which one
        begins where the one before ends, to the rows at `out`.
        """
        blocks = min(pieces.rows, MOST_BLOCKS)
        numbers = map(np.int64, pieces.numbers)
        self._module.launch(self._gpu.stream, "beside", blocks, 256, out, address, *numbers)

    def signal(self, rank: int, flag: int, value: int, stream: Any) -> None:
        """Sets a rank's flag when all earlier work of the stream is done and visible there."""
        from cuda.bindings import driver

        at = self._flags + rank * self._pitch + flag * LINE
        if self._by_kernels:
            return self._module.launch(stream, "set_flag", 1, 1, at, np.uint32(value))
        flags = driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        cuda(driver.cuStreamWriteValue32(int(stream.handle), at, value, int(flags)))

    def wait(self, flag: int, value: int, stream: Any) -> None:
        """The stream's later work waits until the own flag is at least `value`."""
        from cuda.bindings import driver

        if self._lost.is_set():
            return
        at = self._flags + self._rank * self._pitch + flag * LINE
        if self._by_kernels:
            return self._module.launch(stream, "wait_flag", 1, 1, at, np.uint32(value))
        flags = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        cuda(driver.cuStreamWaitValue32(int(stream.handle), at, value, int(flags)))

    def poison(self) -> None:
        """Ends every wait of this rank, present and future: from here on results are worth nothing.

        Any thread may call it at any time; it calls no CUDA. Ranks that live may still set flags to smaller
        values, so a thread repeats it until `close`.
        """
        self._lost.set()
        self._end_waits()
        if self._watch is None:
            self._watch = threading.Thread(target=self._keep_ended, daemon=True)
            self._watch.start()

    def close(self) -> None:
        """Ends all waits, then gives everything back. Call before the Gpu's `close`, when no rank's results
        depend on this one. Succeeds after a fault.
        """
        from cuda.bindings import runtime

        if self._closed.is_set():
            return
        self.poison()
        with suppress(TrtWanError):
            self._gpu.sync()
        self._closed.set()
        if self._watch is not None:
            self._watch.join()
        own = self._blocks.pop(self._rank, None)
        with suppress(TrtWanError):
            for address in self._blocks.values():
                cuda(runtime.cudaIpcCloseMemHandle(address))
            if own is not None:
                cuda(runtime.cudaFree(own))
        with suppress(TrtWanError):
            assert self._whole is not None
            cuda(runtime.cudaHostUnregister(self._whole.ctypes.data))
        self._blocks.clear()
        self._own = np.zeros(1, np.uint32)
        self._whole = None  # the pages go with the last array of them, which a traceback may hold

    def _take(self, ranks: Ranks, size: int) -> None:
        """Allocates the own block and maps those of the others."""
        from cuda.bindings import runtime

        size = max(1, -(-size // PIECE)) * PIECE
        own = self._blocks[self._rank] = int(cuda(runtime.cudaMalloc(size)))
        cuda(runtime.cudaMemsetAsync(own, 0, size, self._gpu.handle))
        self._gpu.sync()
        handle = cuda(runtime.cudaIpcGetMemHandle(own))
        for rank, given in enumerate(ranks.exchange(_bytes(handle).raw)):
            if rank != self._rank:
                self._blocks[rank] = _opened(given, self._rank, rank)
        ranks.exchange(b"")  # all have opened all: whoever cannot has ended

    def _streams_signal(self) -> bool:
        """Whether streams set flags and wait for them here."""
        self._by_kernels = False
        try:
            return self._works()
        except GpuFault:  # not supported: nothing was enqueued
            _forget_error()
            return False

    def _works(self) -> bool:
        """Whether a stream that waits for flag 0 goes on when another has set it."""
        self._own[0] = 0
        # CUDA loads a kernel at its first launch, for which no kernel may be waiting here.
        self.signal(self._rank, 0, 0, self._gpu.loads)
        self.wait(0, 0, self._gpu.loads)
        self._gpu.loads.sync()
        self.wait(0, 1, self._gpu.copies)
        try:
            waited = self._gpu.copies.record()
            self.signal(self._rank, 0, 1, self._gpu.loads)
            end = time.monotonic() + PROBE_SECONDS
            while not waited.is_done and time.monotonic() < end:
                time.sleep(0.001)
            return bool(waited.is_done)
        finally:
            self._own[0] = 1  # so that the stream goes on

    def _end_waits(self) -> None:
        self._own[:] = ENDED

    def _keep_ended(self) -> None:
        while not self._closed.wait(0.01):
            self._end_waits()


def _shared_pages(ranks: Ranks, size: int) -> mmap.mmap:
    """Memory, 0 at first, that all ranks have mapped. Its file is gone when this returns."""
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    name = ""
    if ranks.rank == 0:
        descriptor, name = tempfile.mkstemp(prefix="trt-wan-", dir=SHARED if SHARED.is_dir() else None)
        os.truncate(descriptor, size)
        os.close(descriptor)
    try:
        path = ranks.exchange(name.encode())[0].decode()
        with open(path, "r+b") as file:
            pages = mmap.mmap(file.fileno(), size)
        ranks.exchange(b"")
    finally:
        if name:
            os.unlink(name)
    return pages


def _registered(host: NDArray[np.uint32]) -> int:
    """The address of host memory for the GPU."""
    from cuda.bindings import runtime

    flags = runtime.cudaHostRegisterMapped | runtime.cudaHostRegisterPortable
    try:
        cuda(runtime.cudaHostRegister(host.ctypes.data, host.nbytes, flags))
        return int(cuda(runtime.cudaHostGetDevicePointer(host.ctypes.data, 0)))
    except GpuFault as error:
        raise EnvironmentBroken(
            f"Processes cannot share memory that the GPU reads: {error}", ONE_GPU
        ) from error


def _opened(handle: bytes, own: int, rank: int) -> int:
    """The address of another process's block, from its handle."""
    from cuda.bindings import runtime

    given = runtime.cudaIpcMemHandle_t()
    ctypes.memmove(_bytes(given), handle, HANDLE_BYTES)
    code, address = runtime.cudaIpcOpenMemHandle(given, runtime.cudaIpcMemLazyEnablePeerAccess)
    if int(code) == OUT_OF_MEMORY:
        cuda((code,))
    if int(code):
        _forget_error()
        raise EnvironmentBroken(
            f"GPU {own} cannot write the memory of GPU {rank} ({code.name}).",
            f"Choose GPUs that `nvidia-smi topo -p2p w` shows as OK, by CUDA_VISIBLE_DEVICES. {ONE_GPU}",
        )
    return int(address)


def _no_flags() -> EnvironmentBroken:
    return EnvironmentBroken(
        "On this machine no stream of a GPU sees what another process writes.",
        f"Update the NVIDIA driver. {ONE_GPU}",
    )


def _bytes(handle: Any) -> Any:
    """The memory of a cudaIpcMemHandle_t, whose fields the bindings leave out."""
    return (ctypes.c_char * HANDLE_BYTES).from_address(handle.getPtr())


def _forget_error() -> None:
    """Libraries that ask for CUDA's last error would take ours for theirs."""
    from cuda.bindings import runtime

    runtime.cudaGetLastError()
