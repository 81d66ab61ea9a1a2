"""Block-sparse attention: our attention to the blocks of keys that are kept, and means for the others."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.attention.hopper import ListedAttention
from trt_wan.runtime.segments.attention.select import BlockChoice


class Sparse:
    """For the network `sparse_attention`. bf16 in and out. For `order` and `first` see select.py."""

    def __init__(
        self, gpu: Gpu, heads: int, tokens: int, head_dim: int, order: NDArray[np.int32], first: int
    ) -> None:
        self._choice = BlockChoice(gpu, heads, head_dim, order, first)
        self._attention = ListedAttention(gpu, heads, tokens, head_dim)
        parts = self._choice.parts() | {"attention": self._attention.scratch_bytes}
        self._offsets, self.scratch_bytes = laid_out(parts)
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}
        self._attention.start(self._at["attention"])

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        self._choice.choose(a["q"], a["k"], a["v"], a["keep"], self._attention.partial, at)
        self._attention.pack_listed(a, at["means"], self._choice.order)
        self._attention.attend_listed(a["attended"], at["list"], at["count"], at["kept"], self._choice.order)

    def settle(self) -> None:
        pass
