"""Block-sparse attention: which blocks of 128 keys each block of 128 queries of a head attends to.

The score of a pair of blocks is the product of their means, of q and of k. Each row keeps the blocks with the
highest scores: a share of all, so that every row takes the same time. The blocks of the reference (slot 0),
the row's own and the last, which may be short, are always among them. A block that is skipped still counts,
as 128 keys that are equal to its mean. The same inputs give the same blocks.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trt_wan.engines.contracts.sparse_attention import BLOCK
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import ATTENTION, THREADS, Module, read_source

QUERIES = 16  # blocks of queries that share a block of threads, as in select.cu
ROWS = THREADS // 32  # a warp chooses for one block of queries
SHARED_BYTES = 32 << 10  # of add_skipped: two tiles of 32 means of keys and values
SELECT = read_source(__package__, "select.cu")
SOURCE = ATTENTION + SELECT + read_source(__package__, "skipped.cu")
NAMES = ("pool_blocks", "rank_blocks", "choose_blocks", "add_skipped")


def macros(head_dim: int) -> dict[str, object]:
    return {"HEAD_DIM": head_dim, "BLOCK": BLOCK, "LOG_BLOCK": f"{math.log(BLOCK)}f"}


class BlockChoice:
    """The kernels for one shape, on the Gpu's stream. `first` tokens are the reference's."""

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int, first: int) -> None:
        self._shape = heads, tokens, head_dim
        self._blocks, self._always = -(-tokens // BLOCK), -(-first // BLOCK)
        self._stream, made = gpu.stream, macros(head_dim)
        self._module = gpu.once((__name__, head_dim), lambda: Module(gpu.device, SOURCE, NAMES, made))

    def parts(self) -> dict[str, int]:
        """Bytes of the buffers in the scratch. `list` is int32 [heads, blocks, blocks]: for each block of
        queries the numbers of the blocks of keys that it keeps, in ascending order, then those of the others.
        `count` is int32 [heads, blocks]: how many are kept. `means` are those of k and v, bf16 [2, heads,
        blocks, head_dim].
        """
        heads, _, head_dim = self._shape
        rows = heads * self._blocks
        matrix = rows * self._blocks * 4
        means = 2 * rows * head_dim
        return {"pooled": means * 4, "means": means * 2, "ranks": matrix, "list": matrix, "count": rows * 4}

    def choose(self, q: int, k: int, v: int, keep: int, at: Mapping[str, int]) -> None:
        """Fills the parts, whose addresses are in `at`. q, k and v are bf16 [heads, tokens, head_dim]; `keep`
        is float32 [1], the share.
        """
        heads, tokens, _ = self._shape
        blocks, rows = self._blocks, heads * self._blocks
        pooled = at["pooled"]
        self._launch("pool_blocks", 3 * rows, q, k, v, pooled, at["means"], np.int64(tokens), np.int64(heads))
        grid = heads * -(-blocks // QUERIES) * -(-blocks // THREADS)
        sizes = np.int64(blocks), np.int64(self._always)
        self._launch("rank_blocks", grid, pooled, at["ranks"], *sizes)
        lists = at["list"], at["count"], keep
        self._launch("choose_blocks", -(-rows // ROWS), at["ranks"], *lists, *sizes, np.int64(rows))

    def add_skipped(self, q: int, lse: int, attended: int, at: Mapping[str, int]) -> None:
        """Call after the attention to the kept blocks. `lse` is its logarithm of the sum of exp(score),
        float32 [heads, tokens]; `attended`, bf16 [tokens, heads * head_dim], is changed in place.
        """
        heads, tokens, _ = self._shape
        self._launch(
            "add_skipped",
            (self._blocks, heads),
            *(q, at["means"], at["list"], at["count"], lse, attended, np.int64(tokens)),
            shared=SHARED_BYTES,
        )

    def _launch(self, name: str, grid: int | tuple[int, int], *arguments: Any, shared: int = 0) -> None:
        self._module.launch(self._stream, name, grid, THREADS, *arguments, shared=shared)
