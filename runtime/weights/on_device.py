"""Weights on the GPU: resident, or streamed through a few slots ahead of their use.

The weights of one network and set (of block 7's `attn_out`, say) are one *pack*: a run of bytes, each tensor
at a multiple of 256. A resident pack has a buffer of its own. Streamed packs come around in the same order
every step; a thread writes the next ones from their files into pinned memory and from there into the slots
of those already used, while the GPU computes.
"""

import math
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import Network, Tensor
from trt_wan.runtime.device.arena import ALIGNMENT
from trt_wan.runtime.device.gpu import DeviceArray, Gpu, Pinned, copy

SLOTS = 2  # one in use, one on its way
Key = tuple[str, int]  # network, set


@dataclass(frozen=True)
class Pack:
    network: Network
    n: int
    offsets: Mapping[str, int]  # bytes from the start of the pack
    size: int

    @staticmethod
    def of(network: Network, n: int) -> "Pack":
        offsets, size = {}, 0
        for tensor in network.weights:
            offsets[tensor.name] = size
            size += -(-nbytes(tensor) // ALIGNMENT) * ALIGNMENT
        return Pack(network, n, offsets, size)

    def arrays(self, gpu: Gpu, address: int) -> dict[str, DeviceArray]:
        return {
            t.name: gpu.view(address + self.offsets[t.name], t.shape, t.dtype) for t in self.network.weights
        }


def nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


class WeightSource(Protocol):
    """Where weights come from: files, or a random generator."""

    def fill_device(self, gpu: Gpu, pack: Pack, arrays: Mapping[str, DeviceArray]) -> None:
        """Enqueues the writing of every tensor of the pack."""
        ...

    def fill_host(self, pack: Pack, target: NDArray[np.uint8]) -> None:
        """Writes the pack's bytes; called from another thread."""
        ...


class DeviceWeights:
    """Packs by network and set."""

    def __init__(self, gpu: Gpu, source: WeightSource) -> None:
        self.gpu, self.source = gpu, source
        self.passing: set[str] = set()
        self._resident: dict[Key, tuple[Any, dict[str, DeviceArray]]] = {}
        self._stream: _Stream | None = None

    def plan(self, streamed: list[Pack], passing: Collection[str]) -> None:
        """Call before a job. `streamed` packs are not resident; they are in the order of a step. The packs of
        networks `passing` are freed after each use.
        """
        self.passing = set(passing)
        self._stream = _Stream(self.gpu, self.source, streamed) if streamed else None

    def prefetch(self, packs: list[Pack]) -> None:
        """`packs` are in the order of their first use."""

    def close(self) -> None:
        self.release({name for name, _ in self._resident})
        self._stream = None

    def bind(self, network: Network, n: int) -> dict[str, DeviceArray]:
        """The weights, ready for what is enqueued next on the compute stream."""
        key = (network.name, n)
        if self._stream is not None and key in self._stream.position:
            return self._stream.bind(key)
        if key not in self._resident:
            pack = Pack.of(network, n)
            buffer = self.gpu.allocate(max(pack.size, ALIGNMENT))
            arrays = pack.arrays(self.gpu, int(buffer.handle))
            self.source.fill_device(self.gpu, pack, arrays)
            self._resident[key] = buffer, arrays
        return self._resident[key][1]

    def used(self, network: Network, n: int) -> None:
        """Says that everything that reads the weights is enqueued."""
        key = (network.name, n)
        if self._stream is not None and key in self._stream.position:
            self._stream.used(key)
        elif network.name in self.passing:
            self._free(key)

    def release(self, names: set[str]) -> None:
        """Frees the resident packs of some networks, after what is enqueued."""
        for key in [key for key in self._resident if key[0] in names]:
            self._free(key)

    def _free(self, key: Key) -> None:
        buffer, _ = self._resident.pop(key)
        buffer.close(self.gpu.stream)


class _Stream:
    def __init__(self, gpu: Gpu, source: WeightSource, packs: list[Pack]) -> None:
        self.gpu, self.source, self.packs = gpu, source, packs
        self.position = {(pack.network.name, pack.n): i for i, pack in enumerate(packs)}
        largest = max(pack.size for pack in packs)
        self._slots = [gpu.allocate(largest) for _ in range(SLOTS)]
        self._pinned = [Pinned(largest) for _ in range(2)]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._turn = 0  # packs asked for so far, over all steps
        self._ready: dict[int, Future[Any]] = {}
        taken = gpu.stream.record()  # memory of another stream, usable once that got it
        for turn in range(SLOTS):
            self._load(turn, taken)

    def bind(self, key: Key) -> dict[str, DeviceArray]:
        expected = self._turn % len(self.packs)
        assert self.position[key] == expected, f"{key} is asked for, the {expected}th pack is due"
        self.gpu.stream.wait(self._ready.pop(self._turn).result())
        slot = self._slots[self._turn % SLOTS]
        return self.packs[expected].arrays(self.gpu, int(slot.handle))

    def used(self, key: Key) -> None:
        self._load(self._turn + SLOTS, self.gpu.stream.record())
        self._turn += 1

    def _load(self, turn: int, slot_free: Any) -> None:
        self._ready[turn] = self._thread.submit(self._write, turn, slot_free)

    def _write(self, turn: int, slot_free: Any) -> Any:
        self.gpu.device.set_current()
        pack = self.packs[turn % len(self.packs)]
        pinned = self._pinned[turn % len(self._pinned)]
        pinned.wait()
        self.source.fill_host(pack, pinned.bytes[: pack.size])
        self.gpu.copies.wait(slot_free)
        copy(int(self._slots[turn % SLOTS].handle), pinned.address, pack.size, self.gpu.copies)
        pinned.used_by(self.gpu.copies)
        return self.gpu.copies.record()
