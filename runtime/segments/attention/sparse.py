"""Block-sparse attention: our attention to the blocks of keys that are kept, and means for the others."""

from collections.abc import Mapping

from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.attention.hopper import HopperAttention
from trt_wan.runtime.segments.attention.select import BlockChoice


class Sparse:
    """For the network `sparse_attention`; `first` tokens are the reference's. bf16 in and out."""

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int, first: int) -> None:
        self._choice = BlockChoice(gpu, heads, tokens, head_dim, first)
        self._attention = HopperAttention(gpu, heads, tokens, head_dim, "int8", "e4m3", LISTS=1)
        numbers = dict.fromkeys(("shift", "lse"), heads * tokens * 4)
        parts = self._choice.parts() | numbers | {"attention": self._attention.scratch_bytes}
        self._offsets, self.scratch_bytes = laid_out(parts)
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}
        self._attention.start(self._at["attention"])

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        self._choice.choose(a["q"], a["k"], a["v"], a["keep"], at)
        self._attention.enqueue(a, at["list"], at["count"], at["shift"], at["lse"])
        self._choice.add_skipped(a["q"], at["lse"], a["attended"], at)

    def settle(self) -> None:
        pass
