"""The GPU as the executor sees it: arrays in one arena, copies to and from the host, and the small kernels.

Everything is enqueued on one compute stream; only `DeviceArray.__array__` (a download) and `sync` wait.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8_e4m3fn with numpy)
import numpy as np
from numpy.typing import DTypeLike, NDArray

from trt_wan.errors import EnvironmentBroken, MemoryShort
from trt_wan.runtime.device.arena import Arena, Span
from trt_wan.runtime.device.kernels import MAX_TERMS, NAMES, SOURCE, THREADS, Module

Host = NDArray[Any]

T = TypeVar("T")

STAGING_BYTES = 64 << 20  # pinned memory for copies; pinning costs about a second per GB


class DeviceArray:
    """An array on the GPU, contiguous; its bytes return to where they came from when it is forgotten."""

    def __init__(
        self, gpu: "Gpu", address: int, shape: Sequence[int], dtype: DTypeLike, span: Span | None
    ) -> None:
        self.gpu, self.address, self.shape, self.dtype = gpu, address, tuple(shape), np.dtype(dtype)
        self._span = span

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
        if self._span is not None:
            self.gpu.arena.give(self._span)


class Gpu:
    """Device `ordinal`, with `arena_bytes` of it taken for activations at once."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.core import Device

            self.device = Device(ordinal)
            self.device.set_current()
        except Exception as error:  # without a driver cuda.core raises whatever the loader did
            raise EnvironmentBroken(
                f"No CUDA device can be used ({str(error).splitlines()[0]}).",
                "Install an NVIDIA driver, or run on the CPU with --executor onnxruntime.",
            ) from error
        self.stream = self.device.create_stream()
        self.copies = self.device.create_stream()
        self.kernels = Module(self.device, SOURCE, NAMES)
        self.arena = Arena(0)
        self._arena_buffer: Any = None
        self._staging = Pinned(STAGING_BYTES)
        self._made: dict[Hashable, Any] = {}

    @property
    def name(self) -> str:
        return str(self.device.name)

    @property
    def capability(self) -> tuple[int, int]:
        major, minor = self.device.compute_capability
        return major, minor

    @property
    def driver(self) -> int:
        """The driver's CUDA version, major number: engines built under another are built again."""
        from cuda.bindings import runtime

        error, version = runtime.cudaDriverGetVersion()
        assert not error, error
        return int(version) // 1000

    @property
    def handle(self) -> int:
        return int(self.stream.handle)

    def free_bytes(self) -> int:
        from cuda.bindings import runtime

        error, free, _ = runtime.cudaMemGetInfo()
        assert not error, error
        return int(free)

    def reserve(self, arena_bytes: int) -> None:
        """Takes the arena. No array of an earlier one may be alive."""
        assert self.arena.used == 0, f"{self.arena.used} bytes of the arena are in use"
        self._arena_buffer = self.allocate(arena_bytes)
        self.arena = Arena(arena_bytes)

    def allocate(self, size: int) -> Any:
        """A buffer outside the arena, for what is no activation: weights, engines' scratch."""
        try:
            return self.device.allocate(size, stream=self.stream)
        except Exception as error:
            raise MemoryShort(
                f"{size / 1e9:.1f} GB of GPU memory could not be taken; "
                f"{self.free_bytes() / 1e9:.1f} GB are free.",
                "Close other programs on the GPU, or lower --vram.",
            ) from error

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        span = self.arena.take(math.prod(shape) * np.dtype(dtype).itemsize)
        return DeviceArray(self, int(self._arena_buffer.handle) + span.start, shape, dtype, span)

    def view(self, address: int, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """An array over memory that somebody else keeps."""
        return DeviceArray(self, address, shape, dtype, None)

    def upload(self, host: Host) -> DeviceArray:
        array = self.empty(host.shape, host.dtype)
        self.write(array, host)
        return array

    def write(self, array: DeviceArray, host: Host) -> None:
        """Copies host memory of any kind through pinned memory, a piece at a time."""
        source = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        for start in range(0, len(source), STAGING_BYTES):
            piece = source[start : start + STAGING_BYTES]
            self._staging.wait()
            self._staging.bytes[: len(piece)] = piece
            copy(array.address + start, self._staging.address, len(piece), self.stream)
            self._staging.used_by(self.stream)

    def download(self, array: DeviceArray) -> Host:
        host = np.empty(array.shape, array.dtype)
        target = host.reshape(-1).view(np.uint8)
        for start in range(0, len(target), STAGING_BYTES):
            piece = target[start : start + STAGING_BYTES]
            self._staging.wait()
            copy(self._staging.address, array.address + start, len(piece), self.stream)
            self.stream.sync()
            piece[:] = self._staging.bytes[: len(piece)]
        return host

    def combine(self, terms: Sequence[tuple[float, Any]]) -> DeviceArray:
        """The linear combination of `schedulers.Combine`, float32, on the device."""
        arrays = [term if isinstance(term, DeviceArray) else self.upload(term) for _, term in terms]
        assert len(arrays) <= MAX_TERMS, f"{len(arrays)} terms, at most {MAX_TERMS} are possible"
        out = self.empty(arrays[0].shape, np.float32)
        addresses = [array.address for array in arrays] + [0] * (MAX_TERMS - len(arrays))
        factors = [np.float32(factor) for factor, _ in terms] + [np.float32(0)] * (MAX_TERMS - len(arrays))
        self._launch(
            "combine", out.size, out.address, np.int64(out.size), np.int32(len(arrays)), *addresses, *factors
        )
        return out

    def fill_random(self, array: DeviceArray, seed: int, mean: float, deviation: float) -> None:
        """Normal numbers, the same for the same seed and size on every GPU."""
        arguments = (
            array.address,
            np.int64(array.size),
            np.uint64(seed),
            np.float32(mean),
            np.float32(deviation),
        )
        self._launch(f"random_{array.dtype.name}", array.size, *arguments)

    def quantize_rows(self, weight: DeviceArray, values: DeviceArray, scale: DeviceArray) -> None:
        """bf16 [out, in] to E4M3 [out, in] and float32 [out], one scale per output channel."""
        out, inner = weight.shape
        addresses = (weight.address, values.address, scale.address)
        self.kernels.launch(self.stream, "quantize_rows", out, THREADS, *addresses, np.int32(inner))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The object of that key, made at its first use and kept for as long as this Gpu."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def sync(self) -> None:
        self.stream.sync()

    def close(self) -> None:
        """Frees the arena."""
        if self._arena_buffer is not None:
            self._arena_buffer.close(self.stream)
            self._arena_buffer = None

    def _launch(self, name: str, work: int, *arguments: Any) -> None:
        blocks = min(-(-work // THREADS), 8192)  # the kernels stride over the rest
        self.kernels.launch(self.stream, name, blocks, THREADS, *arguments)


class Pinned:
    """Page-locked host memory that one copy at a time reads or writes."""

    def __init__(self, size: int) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        self._buffer = LegacyPinnedMemoryResource().allocate(size)
        self.address = int(self._buffer.handle)
        import ctypes

        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * size).from_address(self.address)
        )
        self._event: Any = None

    def used_by(self, stream: Any) -> None:
        self._event = stream.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.sync()
            self._event = None


def copy(target: int, source: int, size: int, stream: Any) -> None:
    """Enqueues a copy; the driver finds its direction from the addresses."""
    from cuda.bindings import runtime

    kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
    (error,) = runtime.cudaMemcpyAsync(target, source, size, kind, int(stream.handle))
    assert not error, f"copy of {size} bytes: {error}"
