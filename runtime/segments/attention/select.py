"""Block-sparse attention: which blocks of 128 keys each block of 192 queries of a head attends to.

The score of a pair of blocks is the product of their means, of q and of k. Each row keeps the blocks with the
highest scores: a share of all, so that every row takes the same time. The blocks of the reference (slot 0),
those with the row's tokens and the last, which may be short, are always among them. A block that is skipped
still counts, as 128 keys that are equal to its mean. The same inputs give the same blocks.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contracts.sparse_attention import BLOCK, QUERIES
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import ATTENTION, THREADS, Module, read_source

GROUP = 16  # blocks of queries that share a block of threads, as in select.cu
ROWS = THREADS // 32  # a warp chooses for one block of queries
SKIPPED_THREADS = 128  # of add_skipped, 64 queries
SHARED_BYTES = 32 << 10  # of add_skipped: two tiles of 32 means of keys and values
SELECT = read_source(__package__, "select.cu")
SOURCE = ATTENTION + SELECT + read_source(__package__, "skipped.cu")
NAMES = ("sort_and_pool", "rank_blocks", "choose_blocks", "add_skipped")


def macros(head_dim: int) -> dict[str, object]:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK": BLOCK,
        "QUERIES": QUERIES,
        "LOG_BLOCK": f"{math.log(BLOCK)}f",
    }


class BlockChoice:
    """The kernels for one shape, on the Gpu's stream. `order` has the tokens' numbers as the blocks take
    them; the first `first` are the reference's.
    """

    def __init__(self, gpu: Gpu, heads: int, head_dim: int, order: NDArray[np.int32], first: int) -> None:
        tokens = len(order)
        self._shape = heads, tokens, head_dim
        self._rows, self._blocks = -(-tokens // QUERIES), -(-tokens // BLOCK)
        self._always = -(-first // BLOCK)
        self._stream, made = gpu.stream, macros(head_dim)
        self._module = gpu.once((__name__, head_dim), lambda: Module(gpu.device, SOURCE, NAMES, made))
        self._order_buffer = gpu.allocate(order.nbytes)
        self._order = int(self._order_buffer.handle)
        gpu.write(gpu.view(self._order, order.shape, np.int32), order)

    def parts(self) -> dict[str, int]:
        """Bytes of the buffers in the scratch, all in the order of the blocks. `sorted` is bf16 [3, heads,
        tokens, head_dim]: q, k and v. `list` is int32 [heads, query blocks, key blocks]: for each block of
        queries the numbers of the blocks of keys that it keeps, in ascending order, then those of the others.
        `count` is int32 [heads, query blocks]: how many are kept. `means` are those of k and v, bf16
        [2, heads, key blocks, head_dim]. `exact` is bf16 [tokens, heads * head_dim] and `lse` float32
        [heads, tokens]: see `finish`.
        """
        heads, tokens, head_dim = self._shape
        values, rows = heads * tokens * head_dim, heads * self._rows
        matrix, means = rows * self._blocks * 4, 2 * heads * self._blocks * head_dim
        return {
            "sorted": 3 * values * 2,
            "pooled": heads * (self._rows + self._blocks) * head_dim * 4,
            "means": means * 2,
            "ranks": matrix,
            "list": matrix,
            "count": rows * 4,
            "exact": values * 2,
            "lse": heads * tokens * 4,
        }

    def sorted(self, at: Mapping[str, int]) -> dict[str, int]:
        """The addresses of q, k and v in the order of the blocks."""
        heads, tokens, head_dim = self._shape
        return {name: at["sorted"] + i * heads * tokens * head_dim * 2 for i, name in enumerate("qkv")}

    def choose(self, q: int, k: int, v: int, keep: int, at: Mapping[str, int]) -> None:
        """Fills the parts, whose addresses are in `at`, but not `exact` and `lse`. q, k and v are bf16
        [heads, tokens, head_dim]; `keep` is float32 [1], the share.
        """
        heads, tokens, _ = self._shape
        blocks, rows = self._blocks, self._rows
        made = at["sorted"], at["pooled"], at["means"], np.int64(tokens), np.int64(heads)
        self._launch("sort_and_pool", heads * (rows + 2 * blocks), q, k, v, self._order, *made)
        grid = heads * -(-rows // GROUP) * -(-blocks // THREADS)
        sizes = np.int64(rows), np.int64(blocks), np.int64(self._always)
        self._launch("rank_blocks", grid, at["pooled"], at["ranks"], *sizes)
        lists = at["list"], at["count"], keep
        grid = -(-heads * rows // ROWS)
        self._launch("choose_blocks", grid, at["ranks"], *lists, *sizes, np.int64(heads))

    def finish(self, attended: int, at: Mapping[str, int]) -> None:
        """Writes `attended`, bf16 [tokens, heads * head_dim] in the order of the video: `exact`, the
        attention to the kept blocks, and the means of the others. `lse` is the logarithm of the sum of
        exp(score) over the kept keys.
        """
        heads, tokens, _ = self._shape
        inputs = (at["sorted"], *(at[name] for name in ("means", "list", "count", "lse", "exact")))
        parts = QUERIES * 2 // SKIPPED_THREADS  # a warp has 16 queries
        grid, outputs = (parts * self._rows, heads), (self._order, attended, np.int64(tokens))
        arguments = *inputs, *outputs
        self._launch("add_skipped", grid, *arguments, threads=SKIPPED_THREADS, shared=SHARED_BYTES)

    def _launch(
        self,
        name: str,
        grid: int | tuple[int, int],
        *arguments: Any,
        threads: int = THREADS,
        shared: int = 0,
    ) -> None:
        self._module.launch(self._stream, name, grid, threads, *arguments, shared=shared)
