"""Attention to memories by memory_attention.cu, in the place of the graphs `track_attention_<n>`.

One head of 256 channels over 4096 queries and 28,000 keys and more. TensorRT-RTX 1.6 fuses it, but gives a
block of threads all the keys of its queries, so most multiprocessors idle (docs/log.md).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from trt_wan.engines.sam2.config import Sam2Config
from trt_wan.errors import EnvironmentBroken
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import ATTENTION, THREADS, Module, read_source

OLDEST = (8, 0)  # compute capability
WARPS = 8
QUERIES = 16 * WARPS  # per block of threads
TILE = 64  # keys
MOST_SHARES = 8
NAMES = ("attend", "join_shares")
SOURCE = ATTENTION + read_source(__package__, "memory_attention.cu")


def require_kernel(capability: tuple[int, int]) -> None:
    if capability < OLDEST:
        found, oldest = (".".join(map(str, version)) for version in (capability, OLDEST))
        raise EnvironmentBroken(
            f"A GPU of compute capability {found} is too old for SAM2's kernels.",
            f"Use one of {oldest} or newer, or the CPU: --executor onnxruntime.",
        )


def macros(config: Sam2Config) -> dict[str, int]:
    return {"WARPS": WARPS, "TILE": TILE, "CHANNELS": config.channels, "VALUES": config.memory_channels}


def shares_of(blocks: int, multiprocessors: int) -> int:
    """The number of shares of keys that takes the least time, with `blocks` blocks of threads per share.

    A multiprocessor runs one block at a time.
    """
    return min(range(1, MOST_SHARES + 1), key=lambda n: (math.ceil(n * blocks / multiprocessors) / n, n))


class MemoryAttention:
    """The segment for a number of memories; `module` has the kernels."""

    def __init__(self, gpu: Gpu, config: Sam2Config, memories: int, module: Module) -> None:
        self._launch, self._tokens = partial(module.launch, gpu.stream), config.tokens
        self._pairs = config.tokens * config.memory_channels // 2
        self._back_start = memories * config.tokens
        self._shared = 2 * TILE * (config.channels + config.memory_channels) * 2
        module.allow_shared("attend", self._shared)
        self._blocks = math.ceil(config.tokens / QUERIES)
        self._shares = shares_of(self._blocks, gpu.device.properties.multiprocessor_count)
        sums = 4 * self._shares * config.tokens
        parts = {"partial": sums * config.memory_channels, "logs": sums}
        self._offsets, self.scratch_bytes = laid_out(parts)
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        found, tokens = (self._at["partial"], self._at["logs"]), np.int32(self._tokens)
        given = *(addresses[name] for name in ("q", "keys", "values", "seen")), np.int32(self._back_start)
        grid = (self._blocks, self._shares)
        self._launch("attend", grid, 32 * WARPS, *given, *found, tokens, shared=self._shared)
        join = *found, addresses["attended"], np.int32(self._shares), tokens
        self._launch("join_shares", math.ceil(self._pairs / THREADS), THREADS, *join)

    def settle(self) -> None:
        pass


def open_memory_attention(
    gpu: Gpu, config: Sam2Config, memories: Sequence[int]
) -> dict[str, MemoryAttention]:
    """Segments by network, one for each number of memories."""
    module = gpu.once((__name__, config), lambda: Module(gpu.device, SOURCE, NAMES, macros(config)))
    return {f"track_attention_{n}": MemoryAttention(gpu, config, n, module) for n in memories}
