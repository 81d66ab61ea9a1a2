"""Block-sparse attention: which blocks of 128 keys each block of 192 queries of a head attends to.

The score of a pair of blocks is the product of their means, of q and of k. Each row keeps the blocks with the
highest scores: a share of all, so that every row takes the same time. The blocks of the reference (slot 0),
those with the row's tokens and the last, which may be short, are always among them. A block that is skipped
still counts, as 128 keys that are equal to its mean. The same inputs give the same blocks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contracts.sparse_attention import BLOCK, QUERIES
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, read_source

GROUP = 16  # blocks of queries that share a block of threads, as in select.cu
ROWS = THREADS // 32  # a warp chooses for one block of queries
SOURCE = read_source(__package__, "select.cu")
NAMES = ("pool_blocks", "rank_blocks", "choose_blocks")


def macros(head_dim: int) -> dict[str, object]:
    return {"HEAD_DIM": head_dim, "BLOCK": BLOCK, "QUERIES": QUERIES}


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
        self.order = int(self._order_buffer.handle)  # an address
        gpu.write(gpu.view(self.order, order.shape, np.int32), order)

    def parts(self) -> dict[str, int]:
        """Bytes of the buffers in the scratch, all in the order of the blocks. `list` is int32 [heads, query
        blocks, key blocks]: each row begins with the numbers of the blocks of keys that it keeps, in
        ascending order. `count` is int32 [heads, query blocks], their number. `kept` has a bit for each block
        of keys, set where it is kept or where there is none: uint32 [heads, query blocks, 4 * ceil(key blocks
        / 128)]. `means` are those of k and v, bf16 [2, heads, key blocks, head_dim].
        """
        heads, _, head_dim = self._shape
        rows, means = heads * self._rows, 2 * heads * self._blocks * head_dim
        return {
            "pooled": heads * (self._rows + self._blocks) * head_dim * 4,
            "means": means * 2,
            "ranks": rows * self._blocks * 4,
            "list": rows * self._blocks * 4,
            "count": rows * 4,
            "kept": rows * -(-self._blocks // BLOCK) * BLOCK // 8,
        }

    def choose(self, q: int, k: int, v: int, keep: int, partial: int, at: Mapping[str, int]) -> None:
        """Fills the parts, whose addresses are in `at`. q, k and v are bf16 [heads, tokens, head_dim] in the
        order of the video; `keep` is float32 [1], the share. `partial` float32 [2, heads, key blocks, 3,
        head_dim] gets the sums of k's and v's channels over each block, and v's smallest and largest.
        """
        heads, tokens, _ = self._shape
        blocks, rows = self._blocks, self._rows
        made = at["pooled"], at["means"], partial, np.int64(tokens), np.int64(heads)
        self._launch("pool_blocks", heads * (rows + 2 * blocks), q, k, v, self.order, *made)
        grid = heads * -(-rows // GROUP) * -(-blocks // THREADS)
        sizes = np.int64(rows), np.int64(blocks), np.int64(self._always)
        self._launch("rank_blocks", grid, at["pooled"], at["ranks"], *sizes)
        lists = at["list"], at["count"], at["kept"], keep
        grid = -(-heads * rows // ROWS)
        self._launch("choose_blocks", grid, at["ranks"], *lists, *sizes, np.int64(heads))

    def _launch(self, name: str, grid: int, *arguments: Any) -> None:
        self._module.launch(self._stream, name, grid, THREADS, *arguments)
