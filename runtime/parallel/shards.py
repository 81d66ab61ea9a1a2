"""Which tokens and heads each rank has. Arrays without batch axis; `slots` T1, tokens of a slot P.

Tokens are split inside the slots: in every slot, rank r holds `share` = ceil(P/N) tokens from r·share on. So
a fuser finds the tokens of each slot beside the slot's face tokens, and each rank has as much to do. Its rows
are [slot, share]; the last ranks may lack tokens, and have padding there: zeros, whose results are not read.
In self-attention rank r has `heads_each` = ceil(heads/N) heads from r·heads_each on, over all tokens in the
plan's order without padding. The last ranks may lack heads too. A rank attends with them in one call for each
of its `groups`. With `to_rows` attention takes and leaves the own tokens where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import ShardPlan
from trt_wan.runtime.executors import Array


@dataclass(frozen=True)
class Shards:
    ranks: int
    slots: int
    slot_tokens: int
    heads: int
    head_dim: int
    groups: tuple[int, ...] = ()  # heads of each call of attention, by default all of a rank's in one
    to_rows: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups) or (self.heads_each,))
        assert sum(self.groups) == self.heads_each, f"{self.heads_each} heads in groups of {self.groups}"
        assert not self.to_rows or self.is_even, "with to_rows no rank may lack tokens or heads"

    @staticmethod
    def of(config: ModelConfig, plan: ShardPlan) -> "Shards":
        c, whole = config.transformer, plan.undivided
        return Shards(plan.ranks, plan.slots, whole.tokens_per_slot, c.heads, c.head_dim)

    @property
    def is_even(self) -> bool:
        """Whether no rank lacks tokens or heads."""
        return self.slot_tokens % self.ranks == self.heads % self.ranks == 0

    @property
    def share(self) -> int:
        """Rows of every slot that a rank has, with padding."""
        return -(-self.slot_tokens // self.ranks)

    @property
    def heads_each(self) -> int:
        return -(-self.heads // self.ranks)

    def tokens_of(self, rank: int) -> range:
        """The rank's tokens of a slot, without padding."""
        start = min(rank * self.share, self.slot_tokens)
        return range(start, min(start + self.share, self.slot_tokens))

    def heads_of(self, rank: int) -> range:
        start = min(rank * self.heads_each, self.heads)
        return range(start, min(start + self.heads_each, self.heads))

    def split(self, x: Array, rank: int) -> Array:
        """A rank's rows of [slots·slot_tokens, …]."""
        rest, tokens = x.shape[1:], self.tokens_of(rank)
        rows = np.zeros((self.slots, self.share, *rest), x.dtype)
        rows[:, : len(tokens)] = x.reshape(self.slots, self.slot_tokens, *rest)[:, tokens.start : tokens.stop]
        return rows.reshape(self.slots * self.share, *rest)

    def join(self, rows: Sequence[Array]) -> Array:
        """[slots·slot_tokens, …] from the rows of every rank."""
        rest = rows[0].shape[1:]
        parts = [
            each.reshape(self.slots, self.share, *rest)[:, : len(self.tokens_of(rank))]
            for rank, each in enumerate(rows)
        ]
        return np.concatenate(parts, axis=1).reshape(self.slots * self.slot_tokens, *rest)

    def to_heads(self, given: Sequence[Array], rank: int) -> Array:
        """A rank's heads over all tokens, [heads_each, slots·slot_tokens, head_dim], from q, k or v of every
        rank's tokens, [heads, slots·share, head_dim].
        """
        own = self.heads_of(rank)
        parts = [each[own.start : own.stop].transpose(1, 0, 2) for each in given]
        made = np.zeros((self.heads_each, self.slots * self.slot_tokens, self.head_dim), given[0].dtype)
        made[: len(own)] = self.join(parts).transpose(1, 0, 2)
        return made

    def to_tokens(self, given: Sequence[Array], rank: int) -> Array:
        """A rank's rows over all channels, [slots·share, heads·head_dim], from the attended tokens of every
        rank's heads, [slots·slot_tokens, heads_each·head_dim].
        """
        rows = [
            self.split(each, rank)[:, : len(self.heads_of(source)) * self.head_dim]
            for source, each in enumerate(given)
        ]
        return np.concatenate(rows, axis=1)
