"""Self-attention by our kernels for Hopper, after passes that pack its inputs (tiles.cu). hopper.cu has bf16
values, hopper_three.cu E4M3 values, and hopper_lists.cu is block-sparse.

In int8, q has a scale per token and k one per tile of tokens, after k's mean over all tokens was subtracted,
which leaves the softmax as it is. In E4M3, v has a scale per channel and its mean subtracted, which is added
to the result. Sums are float32. The log-sum-exp of the scores is an optional result.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np

from trt_wan.engines.contracts import sparse_attention
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import HOPPER, Module, read_source

BEFORE = "hopper_products.cu", "hopper_weights.cu", "hopper_results.cu"
NAMES = ("channel_parts", "channels_whole", "pack_q", "pack_k", "pack_v", "correct_mean", "attend")
HEAD_DIM = 128
QUERIES = 64  # each warpgroup has them
CHUNK = 256  # tokens of one sum
SHARED = 227 << 10  # bytes of a block
BARRIERS = 1024 + 512  # bytes, with the alignment of the tiles
KEPT = QUERIES * HEAD_DIM * 4  # bytes: float32 sums of a warpgroup, with E4M3 values

Scores = Literal["int8", "bf16"]
Values = Literal["e4m3", "bf16"]


def consumers(values: Values) -> int:
    """Warpgroups that compute. Three need fewer registers each: half as many scores at a time, and weights of
    8 bits.
    """
    return 3 if values == "e4m3" else 2


def macros(scores: Scores, values: Values, lists: bool = False) -> dict[str, int]:
    keys = sparse_attention.BLOCK if lists else 96 if values == "e4m3" else 192
    kept = consumers(values) * KEPT if values == "e4m3" else 0
    free = SHARED - BARRIERS - _key_bytes(scores, consumers(values) * QUERIES) - kept
    return {
        "QK": int(scores == "bf16"),
        "PV": int(values == "bf16"),
        "KEYS": keys,
        "STAGES": min(4, free // (_key_bytes(scores, keys) + _value_bytes(values, keys))),
    }


def source(values: Values, lists: bool = False) -> str:
    name = "hopper_lists.cu" if lists else "hopper_three.cu" if values == "e4m3" else "hopper.cu"
    return HOPPER + read_source(__package__, *BEFORE, name, "tiles.cu")


def _key_bytes(scores: Scores, keys: int) -> int:
    return keys * HEAD_DIM * (2 if scores == "bf16" else 1)


def _value_bytes(values: Values, keys: int) -> int:
    return keys * HEAD_DIM * (2 if values == "bf16" else 1)


class HopperAttention:
    """bf16 in and out. `scores` and `values` name the numbers that are multiplied."""

    lists = False  # True in ListedAttention: blocks of queries attend to lists of tiles

    def __init__(
        self, gpu: Gpu, heads: int, tokens: int, head_dim: int, scores: Scores, values: Values
    ) -> None:
        assert head_dim == HEAD_DIM, head_dim
        lists = self.lists
        defined = macros(scores, values, lists)
        self._heads, self._tokens, self._keys = heads, tokens, defined["KEYS"]
        self._tiles = math.ceil(tokens / self._keys)
        queries = consumers(values) * QUERIES
        self._threads = 128 * (1 + consumers(values))
        chunk = self._keys if lists else CHUNK
        self._query_tiles, self._chunks = math.ceil(tokens / queries), math.ceil(tokens / chunk)
        self._key_sums, self._value_sums = scores == "int8", values == "e4m3"
        self._value_shared = defined["KEYS"] * HEAD_DIM * 2
        code, shared = source(values, lists), self._value_shared
        module = gpu.once((__name__, *defined.items()), lambda: _compiled(gpu, code, defined, shared))
        self._launch = partial(module.launch, gpu.stream)
        self._offsets, self.scratch_bytes = laid_out(self._parts(scores, values))
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        self.pack(addresses)
        self.attend(addresses["attended"], places=addresses.get("places", 0))

    def settle(self) -> None:
        pass

    def pack(self, a: Mapping[str, int], shift: int = 0) -> None:
        """Makes tiles of q, k and v. `shift` float32 [heads, tokens], or 0, gets the product of each
        query and k's mean, by which its scores are smaller than the true ones. With `places` the own tokens
        are those of `own_q`, `own_k` and `own_v` (contracts/attention.py).
        """
        if self._key_sums or self._value_sums:
            parts, places = (self._chunks, self._heads, 1 + self._value_sums), a.get("places", 0)
            own = (a["own_k"], a["own_v"]) if places else (0, 0)
            tokens = np.int32(self._tokens)
            self._launch("channel_parts", parts, 256, a["k"], a["v"], self.partial, tokens, *own, places)
        self._make_tiles(a, shift, 0)

    @property
    def partial(self) -> int:
        """The address of float32 [2, heads, chunks, 3, head_dim]: the sum, smallest and largest of every
        channel, of chunks of the tokens of k and of v. k's smallest and largest are not read.
        """
        return self._at["partial"]

    def _make_tiles(self, a: Mapping[str, int], shift: int, order: int) -> None:
        """From q, k, v and `partial`. `order` int32 [tokens], or 0, has the tokens' numbers."""
        places = a.get("places", 0)
        q, k, v = ((a[f"own_{name}"] if places else 0, places, order) for name in "qkv")
        at, tokens, heads = self._at, np.int32(self._tokens), self._heads
        means = at["key_mean"], at["value_mean"], at["value_scale"]
        chunks, value = np.int32(self._chunks), (at["value_mean"], at["value_scale"])
        self._launch("channels_whole", (heads, 2), 128, at["partial"], *means, chunks, tokens)
        mean, grid = at["key_mean"], (self._query_tiles, heads)
        self._launch("pack_q", grid, 256, a["q"], mean, at["q"], at["query_scale"], shift, tokens, *q)
        grid = self._tiles, heads
        self._launch("pack_k", grid, 256, a["k"], mean, at["k"], at["key_scale"], tokens, *k)
        out, shared = (at["v"], at["sums"]), self._value_shared
        self._launch("pack_v", grid, 256, a["v"], *value, *out, tokens, *v, shared=shared)
        if self._value_sums:
            arguments = at["sums"], *reversed(value), np.int32(self._tiles), tokens
            self._launch("correct_mean", heads, 128, *arguments)

    def attend(self, attended: int, shift: int = 0, lse: int = 0, places: int = 0) -> None:
        """After `pack`. `lse` float32 [heads, tokens], or 0, gets the natural logarithm of the sum of
        exp(score); it needs `shift`. With `places` the own tokens' results go into the own rows, and
        `attended` gets the others'.
        """
        self._attend((), attended, shift, lse, places)

    def _attend(self, listed: Sequence[int], attended: int, shift: int, lse: int, places: int) -> None:
        made = ("q", "k", "v", "query_scale", "key_scale", "value_scale", "value_mean")
        rest = *listed, shift, attended, lse, np.int32(self._tokens), places
        grid = self._query_tiles, self._heads
        self._launch("attend", grid, self._threads, *(self._at[name] for name in made), *rest, shared=SHARED)

    def _parts(self, scores: Scores, values: Values) -> dict[str, int]:
        """Bytes of the buffers in the scratch."""
        keys, channels = self._keys, self._heads * HEAD_DIM * 4
        queries, tiles = consumers(values) * QUERIES, self._heads * self._tiles
        query_tiles = self._heads * self._query_tiles
        return {
            "q": query_tiles * _key_bytes(scores, queries),
            "k": tiles * _key_bytes(scores, keys),
            "v": tiles * _value_bytes(values, keys),
            "query_scale": query_tiles * queries * 4,
            "key_scale": tiles * 4,
            "key_mean": channels,
            "value_mean": channels,
            "value_scale": channels,
            "partial": 2 * self._chunks * 3 * channels,
            "sums": self._tiles * channels,
        }


class ListedAttention(HopperAttention):
    """Attends from blocks of 192 queries to listed blocks of 128 keys, and to the means of the other blocks,
    each of which counts as 128 keys. In int8 and E4M3; bf16 in and out.
    """

    lists = True

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        self._mean_tiles = math.ceil(math.ceil(tokens / sparse_attention.BLOCK) / sparse_attention.BLOCK)
        super().__init__(gpu, heads, tokens, head_dim, "int8", "e4m3")
        assert consumers("e4m3") * QUERIES == sparse_attention.QUERIES

    def pack_listed(self, a: Mapping[str, int], means: int, order: int, shift: int = 0) -> None:
        """Makes tiles of q, k and v, whose tokens have their numbers in `order`, int32 [tokens], and of the
        blocks' `means` of k and v, bf16 [2, heads, blocks, head_dim]. Call after `partial` is filled: its
        chunks are the blocks. `shift` as in `pack`, in the order of the blocks.
        """
        self._make_tiles(a, shift, order)
        at, blocks = self._at, np.int32(self._tiles)
        grid, rest = (self._mean_tiles, self._heads), (blocks, 0, 0, 0)
        self._launch("pack_k", grid, 256, means, at["key_mean"], at["mean_k"], at["mean_scale"], *rest)
        values = means + self._heads * self._tiles * HEAD_DIM * 2, at["value_mean"], at["value_scale"]
        made = at["mean_v"], at["mean_sums"]
        self._launch("pack_v", grid, 256, *values, *made, *rest, shared=self._value_shared)

    def attend_listed(
        self, attended: int, lists: int, counts: int, kept: int, order: int, shift: int = 0, lse: int = 0
    ) -> None:
        """After `pack_listed`. `lists`, `counts` and `kept` are `list`, `count` and `kept` of select.py; each
        row lists at least one block. `attended` is bf16 [tokens, heads * head_dim], in the order of the
        inputs; `shift` and `lse` are as in `attend`, in the order of the blocks.
        """
        means = (self._at[name] for name in ("mean_k", "mean_v", "mean_scale"))
        self._attend((lists, counts, *means, kept), attended, shift, lse, order)

    def _parts(self, scores: Scores, values: Values) -> dict[str, int]:
        tiles, keys = self._heads * self._mean_tiles, self._keys
        return super()._parts(scores, values) | {
            "mean_k": tiles * _key_bytes(scores, keys),
            "mean_v": tiles * _value_bytes(values, keys),
            "mean_scale": tiles * 4,
            "mean_sums": tiles * HEAD_DIM * 4,
        }


def _compiled(gpu: Gpu, code: str, defined: Mapping[str, int], value_shared: int) -> Module:
    module = Module(gpu.device, code, NAMES, defined, accelerated=True)
    module.allow_shared("attend", SHARED)
    module.allow_shared("pack_v", value_shared)
    return module


class Native(HopperAttention):
    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        super().__init__(gpu, heads, tokens, head_dim, "bf16", "bf16")


class NativeInt8(HopperAttention):
    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        super().__init__(gpu, heads, tokens, head_dim, "int8", "bf16")


class NativeFp8(HopperAttention):
    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        super().__init__(gpu, heads, tokens, head_dim, "int8", "e4m3")
