"""The GPU as the executor sees it: arrays in one arena, copies to and from the host, and the small kernels.

Everything is enqueued on the compute stream `stream`, except for weights and for results that are fetched
while it goes on: `loads` reads and converts weights, `copies` brings those that stream, `downloads` copies
results. Only downloads and `sync` wait.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8_e4m3fn with numpy)
import numpy as np
from numpy.typing import DTypeLike, NDArray

from trt_wan.errors import EnvironmentBroken, MemoryShort, TrtWanError
from trt_wan.runtime.device.arena import Arena, Span
from trt_wan.runtime.device.checked import cuda, cuda_core
from trt_wan.runtime.device.driver import has_nvidia_gpu
from trt_wan.runtime.device.kernels import MAX_TERMS, NAMES, SOURCE, THREADS, Module
from trt_wan.runtime.device.pinned import PageLocked, Pinned, Ring

Host = NDArray[Any]
T = TypeVar("T")

# Pinned memory for uploads and downloads. With several slots an upload waits only if the host is that many
# uploads ahead of the GPU.
STAGING_SLOTS, STAGING_BYTES = 8, 8 << 20
MOST_BLOCKS = 8192  # in a launch; kernels stride over the rest


class DeviceArray:
    """An array on the GPU, contiguous. Its bytes return to its arena when it is forgotten."""

    def __init__(
        self,
        gpu: "Gpu",
        address: int,
        shape: Sequence[int],
        dtype: DTypeLike,
        span: Span | None = None,
        arena: Arena | None = None,
    ) -> None:
        self.gpu, self.address, self.shape, self.dtype = gpu, address, tuple(shape), np.dtype(dtype)
        self._span, self._arena = span, arena

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Host:
        host = self.gpu.download(self)
        return host if dtype is None else host.astype(dtype)

    def __del__(self) -> None:
        if self._span is not None and self._arena is not None:
            self._arena.give(self._span)


class Gpu:
    """Device `ordinal`. `close` gives all its memory back."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.core import Device

            self.device = Device(ordinal)
            self.device.set_current()
        except Exception as error:  # without a driver cuda.core raises the loader's error, of any class
            raise _unusable(error) from error
        self.ordinal = ordinal
        self.stream = self.device.create_stream()
        self.copies = self.device.create_stream()
        self.loads = self.device.create_stream()
        self.downloads = self.device.create_stream()
        self.kernels = Module(self.device, SOURCE, NAMES)
        self.arena = Arena(0)
        self._staging = Ring(STAGING_SLOTS, STAGING_BYTES)
        self._kept: dict[Hashable, Any] = {}

    @property
    def name(self) -> str:
        return str(self.device.name)

    @property
    def capability(self) -> tuple[int, int]:
        major, minor = self.device.compute_capability
        return major, minor

    @property
    def multiprocessors(self) -> int:
        return int(self.device.properties.multiprocessor_count)

    @property
    def driver(self) -> int:
        """The driver's CUDA version, major number: engines built under another are built again."""
        from cuda.bindings import runtime

        return int(cuda(runtime.cudaDriverGetVersion())) // 1000

    @property
    def handle(self) -> int:
        return int(self.stream.handle)

    def free_bytes(self) -> int:
        """Bytes that can be allocated: free on the device, or freed here and kept by CUDA for later use."""
        from cuda.bindings import runtime

        free, _ = cuda(runtime.cudaMemGetInfo())
        attributes = runtime.cudaMemPoolAttr
        if (pool := self._pool()) is not None:
            reserved = cuda(
                runtime.cudaMemPoolGetAttribute(pool, attributes.cudaMemPoolAttrReservedMemCurrent)
            )
            used = cuda(runtime.cudaMemPoolGetAttribute(pool, attributes.cudaMemPoolAttrUsedMemCurrent))
            return int(free) + int(reserved) - int(used)
        return int(free)

    def reserve(self, arena_bytes: int) -> None:
        """Takes the arena, in place of an earlier one. Arrays of the earlier one keep its memory alive."""
        if self.arena.memory is not None and not self.arena.used:
            self.arena.memory.close(self.stream)
        self.arena = Arena(0)
        self.arena = Arena(arena_bytes, self.allocate(arena_bytes))

    def allocate(self, size: int, stream: Any = None) -> Any:
        """A buffer outside the arena, for weights and engines' scratch. Usable on `stream` (by default the
        compute stream) at once, on others after an event of it. Raises MemoryShort.
        """
        try:
            with cuda_core():
                return self.device.allocate(size, stream=stream or self.stream)
        except MemoryShort as error:
            raise MemoryShort(
                f"{size / 1e9:.1f} GB of GPU memory could not be taken; "
                f"{self.free_bytes() / 1e9:.1f} GB are free.",
                error.hint,
            ) from error

    def pinned(self, size: int) -> Pinned:
        return Pinned(size)

    def page_locked(self, size: int) -> PageLocked:
        return PageLocked(size)

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        copy(target, source, size, stream)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        span = self.arena.take(math.prod(shape) * np.dtype(dtype).itemsize)
        return DeviceArray(self, int(self.arena.memory.handle) + span.start, shape, dtype, span, self.arena)

    def view(self, address: int, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """An array over memory that the caller keeps alive."""
        return DeviceArray(self, address, shape, dtype)

    def upload(self, host: Host) -> DeviceArray:
        array = self.empty(host.shape, host.dtype)
        self.write(array, host)
        return array

    def write(self, array: DeviceArray, host: Host) -> None:
        """Copies host memory of any kind through pinned memory, a piece at a time."""
        source = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        for start in range(0, len(source), self._staging.size):
            piece = source[start : start + self._staging.size]
            _, slot = self._staging.take()
            slot.bytes[: len(piece)] = piece
            self.copy(array.address + start, slot.address, len(piece), self.stream)
            slot.used_by(self.stream)

    def download(self, array: DeviceArray, computed: Any = None) -> Host:
        """Waits for the array's numbers. Pieces are copied to `host` while later ones are on their way.

        `computed` is an event of the compute stream after which the array is there; None: all that is
        enqueued. The copy waits for nothing else.
        """
        stream = self.stream
        if computed is not None:
            stream = self.downloads
            stream.wait(computed)
        host = np.empty(array.shape, array.dtype)
        target = host.reshape(-1).view(np.uint8)
        coming: deque[tuple[Pinned, Host]] = deque()
        for start in range(0, len(target), self._staging.size):
            if len(coming) == len(self._staging):
                _arrive(*coming.popleft())
            piece = target[start : start + self._staging.size]
            _, slot = self._staging.take()
            self.copy(slot.address, array.address + start, len(piece), stream)
            slot.used_by(stream)
            coming.append((slot, piece))
        for slot, piece in coming:
            _arrive(slot, piece)
        return host

    def combine(self, terms: Sequence[tuple[float, Any]]) -> DeviceArray:
        """The linear combination of `Executor.combine`, float32, on the device."""
        arrays = [term if isinstance(term, DeviceArray) else self.upload(term) for _, term in terms]
        assert len(arrays) <= MAX_TERMS, f"{len(arrays)} terms, at most {MAX_TERMS} are possible"
        out = self.empty(arrays[0].shape, np.float32)
        addresses = [array.address for array in arrays] + [0] * (MAX_TERMS - len(arrays))
        factors = [np.float32(factor) for factor, _ in terms] + [np.float32(0)] * (MAX_TERMS - len(arrays))
        counts = np.int64(out.size), np.int32(len(arrays))
        self._launch(self.stream, "combine", out.size, out.address, *counts, *addresses, *factors)
        return out

    def fill_random(
        self,
        array: DeviceArray,
        seed: int,
        mean: float,
        deviation: float,
        stream: Any = None,
        *,
        first: int = 0,
    ) -> None:
        """Normal numbers, the same for the same seed on every GPU, from number `first` of the sequence."""
        numbers = np.uint64(seed), np.int64(first), np.float32(mean), np.float32(deviation)
        kernel = f"random_{array.dtype.name}"
        self._launch(stream or self.stream, kernel, array.size, array.address, np.int64(array.size), *numbers)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The object of that key, made at the first call and kept as long as this Gpu."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    def sync(self) -> None:
        with cuda_core():
            self.stream.sync()

    def close(self) -> None:
        """Frees the arena, the staging memory and the kept objects, and returns unused memory to the system.
        Buffers from `allocate` must be closed before. Succeeds after a GPU fault too.
        """
        from cuda.bindings import runtime

        with suppress(TrtWanError):
            for stream in (self.stream, self.copies, self.loads, self.downloads):
                with cuda_core():
                    stream.sync()
        for kept in self._kept.values():
            if hasattr(kept, "close"):
                kept.close()
        self._kept.clear()
        with suppress(TrtWanError), cuda_core():
            if self.arena.memory is not None:
                self.arena.memory.close(self.stream)
            self.arena = Arena(0)
            self._staging.close()
            self.stream.sync()
            if (pool := self._pool()) is not None:
                cuda(runtime.cudaMemPoolTrimTo(pool, 0))
            for stream in (self.stream, self.copies, self.loads, self.downloads):
                stream.close()

    def _pool(self) -> Any:
        """CUDA's pool that buffers come from; None on a device without pools."""
        from cuda.bindings import runtime

        if not self.device.properties.memory_pools_supported:
            return None
        return cuda(runtime.cudaDeviceGetMemPool(self.ordinal))

    def _launch(self, stream: Any, name: str, work: int, *arguments: Any) -> None:
        blocks = min(-(-work // THREADS), MOST_BLOCKS)
        self.kernels.launch(stream, name, blocks, THREADS, *arguments)


def device_count() -> int:
    """GPUs that CUDA_VISIBLE_DEVICES leaves. Raises EnvironmentBroken."""
    try:
        from cuda.bindings import runtime

        return int(cuda(runtime.cudaGetDeviceCount()))
    except Exception as error:
        raise _unusable(error) from error


def _arrive(slot: Pinned, piece: Host) -> None:
    slot.wait()
    piece[:] = slot.bytes[: len(piece)]


def copy(target: int, source: int, size: int, stream: Any) -> None:
    """Enqueues a copy; the driver finds its direction from the addresses."""
    from cuda.bindings import runtime

    kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
    cuda(runtime.cudaMemcpyAsync(target, source, size, kind, int(stream.handle)))


def _unusable(error: Exception) -> EnvironmentBroken:
    """CUDA's own sentence is for machines that have a GPU. Elsewhere it would be told with every job."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    cpu = "run on the CPU with --executor onnxruntime."
    if has_nvidia_gpu():
        return EnvironmentBroken(
            f"No CUDA device can be used ({said}).", f"Install an NVIDIA driver, or {cpu}"
        )
    return EnvironmentBroken("No NVIDIA GPU is here.", f"R{cpu[1:]} CUDA says: {said}")
