"""Before and after FP8 attention: subtracts the mean of the keys, quantises q, k and v, widens the output.

Subtracting the mean over the tokens from every key adds the same number to all scores of a query, so the
softmax stays the same, and channels that are far from zero in every key no longer use up E4M3's range.
"""

from typing import Any

import numpy as np

from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, read_source

CHUNK = 256  # tokens that one block of threads sums
SOURCE = read_source(__package__, "fp8.cu")
NAMES = ("sum_chunks", "mean", "quantize", "dequantize")
MACROS = {"CHUNK": CHUNK}


class Fp8Kernels:
    """The kernels for one shape, on the Gpu's stream. Arguments are device addresses and numbers."""

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        self.heads, self.tokens, self.head_dim = heads, tokens, head_dim
        self.chunks = -(-tokens // CHUNK)
        self._stream = gpu.stream
        self._module = gpu.once(__name__, lambda: Module(gpu.device, SOURCE, NAMES, MACROS))

    @property
    def partial_bytes(self) -> int:
        """Size of the sums that `key_means` keeps per chunk."""
        return self.heads * self.chunks * self.head_dim * 4

    def key_means(self, k: int, partial: int, means: int) -> None:
        """float32 [heads, head_dim]."""
        dim = np.int32(self.head_dim)
        self._launch("sum_chunks", (self.chunks, self.heads), k, partial, np.int32(self.tokens), dim)
        factor = np.float32(1 / self.tokens)
        self._launch("mean", self.heads, partial, means, np.int32(self.chunks), dim, factor)

    def quantize(self, x: int, out: int, factor: float, means: int = 0) -> None:
        """E4M3 of (x - means) * factor."""
        shape = np.int32(self.tokens), np.int32(self.head_dim)
        blocks = -(-self.tokens * self.head_dim // (8 * THREADS))
        self._launch("quantize", (blocks, self.heads), x, means, out, *shape, np.float32(factor))

    def dequantize(self, x: int, out: int, factor: float) -> None:
        vectors = self.heads * self.tokens * self.head_dim // 8
        self._launch("dequantize", -(-vectors // THREADS), x, out, np.int32(vectors), np.float32(factor))

    def _launch(self, name: str, grid: int | tuple[int, int], *arguments: Any) -> None:
        self._module.launch(self._stream, name, grid, THREADS, *arguments)
