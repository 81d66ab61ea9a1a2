"""Sequence parallelism: every rank holds some tokens of every slot, and in self-attention some of the heads
over all tokens (DeepSpeed-Ulysses; shards.py has the numbers).
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from trt_wan.runtime.executors import Array
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.shards import Shards

Attention = Callable[..., Any]  # q, k, v of some heads, see `attend` -> [tokens, channels]


class SequenceParallel(Protocol):
    def split(self, x: Array) -> Array:
        """The rank's rows [shard tokens, …] of an array [tokens, …]. Rows of padding are 0."""
        ...

    def attend(self, attention: Attention, q: Array, k: Array, v: Array) -> Array:
        """Self-attention of the rank's tokens: q, k, v [heads, shard tokens, head_dim] to [shard tokens,
        channels]. `attention` gets the rank's heads over all tokens in the plan's order, a group at a time.
        If the shards have `to_rows` it gets and returns what contracts/attention.py says, and the result is
        valid until the next call.
        """
        ...

    def join(self, x: Array) -> Array:
        """The rows of all ranks, [tokens, channels], from each rank's own. Valid until the next call."""
        ...


class HostSequence:
    """On the CPU, through the host's memory, and in one group."""

    def __init__(self, ranks: Ranks, shards: Shards) -> None:
        self._ranks, self._shards = ranks, shards

    def split(self, x: Array) -> Array:
        return self._shards.split(np.asarray(x), self._ranks.rank)

    def attend(self, attention: Attention, q: Array, k: Array, v: Array) -> Array:
        given, rank = self._ranks.gather([q, k, v]), self._ranks.rank
        whole = [self._shards.to_heads([each[i] for each in given], rank) for i in range(3)]
        made = self._ranks.gather([attention(*whole)])
        return self._shards.to_tokens([attended for (attended,) in made], rank)

    def join(self, x: Array) -> Array:
        return self._shards.join([rows for (rows,) in self._ranks.gather([x])])
