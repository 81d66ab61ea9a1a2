"""Attention to memories by a kernel of our own: what the graphs would have as `track_attention_<n>`.

One head of 256 channels over 4096 queries and 28,000 keys and more. TensorRT-RTX 1.6 fuses that, but gives a
block of threads all the keys of its queries, which leaves most multiprocessors idle (docs/log.md).
"""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from trt_wan.engines.sam2.config import Sam2Config
from trt_wan.errors import EnvironmentBroken
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import THREADS, allow_shared_memory, attention_source, compile_source

OLDEST = (8, 0)  # compute capability
WARPS = 8
QUERIES = 16 * WARPS  # of a block of threads
TILE = 64  # keys
MOST_SHARES = 8
NAMES = ("attend", "join_shares")


def require_kernel(capability: tuple[int, int]) -> None:
    if capability < OLDEST:
        found, oldest = (".".join(map(str, version)) for version in (capability, OLDEST))
        raise EnvironmentBroken(
            f"A GPU of compute capability {found} is too old for SAM2's kernels.",
            f"Use one of {oldest} or newer, or the CPU: --executor onnxruntime.",
        )


def compile_for(config: Sam2Config, capability: tuple[int, int]) -> Any:
    """The kernels' code; needs no GPU."""
    source = attention_source() + (files(__package__) / "memory_attention.cu").read_text(encoding="utf-8")
    sizes = {"WARPS": WARPS, "TILE": TILE, "CHANNELS": config.channels, "VALUES": config.memory_channels}
    return compile_source(source, *capability, sizes)


def shares_of(blocks: int, multiprocessors: int) -> int:
    """Into how many shares the keys go, so that `blocks` times as many blocks of threads take the least time:
    a multiprocessor has room for one.
    """
    return min(range(1, MOST_SHARES + 1), key=lambda n: (math.ceil(n * blocks / multiprocessors) / n, n))


class MemoryAttention:
    """The segment for `memories` of them; `module` is what `compile_for` made."""

    def __init__(self, gpu: Gpu, config: Sam2Config, memories: int, module: Any) -> None:
        self._gpu, self._tokens = gpu, config.tokens
        self._pairs = config.tokens * config.memory_channels // 2
        self._back_start = memories * config.tokens
        self._attend, self._join = (module.get_kernel(name) for name in NAMES)
        self._shared = 2 * TILE * (config.channels + config.memory_channels) * 2
        allow_shared_memory(self._attend, self._shared)
        self._blocks = math.ceil(config.tokens / QUERIES)
        self._shares = shares_of(self._blocks, gpu.device.properties.multiprocessor_count)
        sums = 4 * self._shares * config.tokens
        parts = {"partial": sums * config.memory_channels, "logs": sums}
        self._offsets, self.scratch_bytes = laid_out(parts)
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        from cuda.core import LaunchConfig, launch

        a, partial, logs = addresses, self._at["partial"], self._at["logs"]
        tokens = np.int32(self._tokens)
        grid = LaunchConfig(grid=(self._blocks, self._shares), block=32 * WARPS, shmem_size=self._shared)
        inputs = a["q"], a["keys"], a["values"], a["seen"], np.int32(self._back_start)
        launch(self._gpu.stream, grid, self._attend, *inputs, partial, logs, tokens)
        grid = LaunchConfig(grid=math.ceil(self._pairs / THREADS), block=THREADS)
        join = partial, logs, a["attended"], np.int32(self._shares), tokens
        launch(self._gpu.stream, grid, self._join, *join)

    def settle(self) -> None:
        pass


def open_memory_attention(
    gpu: Gpu, config: Sam2Config, memories: Sequence[int]
) -> dict[str, MemoryAttention]:
    """By network, one for each number of memories."""
    module = compile_for(config, gpu.capability)
    return {f"track_attention_{n}": MemoryAttention(gpu, config, n, module) for n in memories}
