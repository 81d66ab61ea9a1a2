"""Block-sparse attention: our attention on the blocks of keys that are kept, and means for the others."""

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol

from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.attention.select import BlockChoice


class Listed(Protocol):
    """Attention to the listed blocks of keys, with its logarithms of the sums of exp(score)."""

    def parts(self) -> dict[str, int]:
        """Bytes of its buffers in the scratch."""
        ...

    def enqueue(
        self, addresses: Mapping[str, int], at: Mapping[str, int], list: int, count: int, lse: int
    ) -> None:
        """Takes the addresses of q, k, v, attended and of its parts; for `list`, `count` and `lse` see
        select.py.
        """
        ...


class Sparse:
    """For the network `sparse_attention`; `first` tokens are the reference's. bf16 in and out."""

    def __init__(
        self, gpu: Gpu, heads: int, tokens: int, head_dim: int, first: int, listed: Listed | None = None
    ) -> None:
        self._choice = BlockChoice(gpu, heads, tokens, head_dim, first)
        native = import_module("trt_wan.runtime.segments.attention.native") if listed is None else None
        self._listed: Listed = listed or native.Attention(gpu, heads, tokens, head_dim)  # type: ignore[union-attr]
        parts = self._choice.parts() | self._listed.parts() | {"lse": heads * tokens * 4}
        self._offsets, self.scratch_bytes = laid_out(parts)
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        self._choice.choose(a["q"], a["k"], a["v"], a["keep"], at)
        self._listed.enqueue(a, at, at["list"], at["count"], at["lse"])
        self._choice.add_skipped(a["q"], at["lse"], a["attended"], at)

    def settle(self) -> None:
        pass
