"""Self-attention by a kernel of our own for Hopper (hopper.cu), and the passes before it (tiles.cu). No torch.

q and k are rounded to int8 with a scale per token of q and per 128 tokens of k, after k's mean over the tokens
was subtracted, which leaves the softmax as it is. Weights and values are multiplied in E4M3 with a scale per
channel of v, or in bf16. Sums are float32.
"""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import Module, read_source

SOURCE = read_source(__package__, "hopper.cu", "tiles.cu")
NAMES = ("channel_parts", "channels_whole", "pack_q", "pack_k", "pack_v", "correct_mean", "attend")
QUERIES = 128  # of a block
CHUNK = 256  # tokens of one sum
MOST_SHARED = 227 << 10

# How scores and weighted values are multiplied: the macros QK and PV.
SCORES = {"int8": 0, "e4m3": 1, "bf16": 2}
VALUES = {"e4m3": 0, "bf16": 1}


class HopperAttention:
    """bf16 in and out. `scores` and `values` name how their products are computed."""

    def __init__(
        self, gpu: Gpu, heads: int, tokens: int, head_dim: int, scores: str, values: str, **options: int
    ) -> None:
        assert head_dim == 128, head_dim
        self._heads, self._tokens = heads, tokens
        keys = options.get("KEYS", 128)
        self._tiles, self._query_tiles = math.ceil(tokens / keys), math.ceil(tokens / QUERIES)
        self._value_shared = 2 * keys * head_dim
        query_bytes, key_bytes = ((1 + (scores == "bf16")) * rows * head_dim for rows in (QUERIES, keys))
        value_bytes = (1 + (values == "bf16")) * keys * head_dim
        self._centred = values == "e4m3"
        kept = 2 * 64 * head_dim * 4 if options.get("FLUSH") else 0
        free = MOST_SHARED - 1024 - 512 - query_bytes - kept
        macros = {
            "QK": SCORES[scores],
            "PV": VALUES[values],
            "SUMS": 0,
            "KEYS": keys,
            "TURNS": 1,
            "POLYNOMIALS": 0,
            "STAGES": min(4, free // (key_bytes + value_bytes)),
            "LISTS": 0,
            "FLUSH": 0,
            "SPIN_LIMIT": 0,
        } | options
        self._shared = 1024 + 512 + query_bytes + kept + macros["STAGES"] * (key_bytes + value_bytes)
        module = gpu.once((__name__, *macros.items()), lambda: _compiled(gpu, macros, self._shared, self._value_shared))
        self._launch = partial(module.launch, gpu.stream)
        self._chunks = math.ceil(tokens / CHUNK)
        queries, tiles = heads * self._query_tiles, heads * self._tiles
        channels = heads * head_dim * 4
        self._offsets, self.scratch_bytes = laid_out(
            {
                "q": queries * query_bytes,
                "k": tiles * key_bytes,
                "v": tiles * value_bytes,
                "query_scale": queries * QUERIES * 4,
                "key_scale": tiles * 4,
                "key_mean": channels,
                "value_mean": channels,
                "value_scale": channels,
                "partial": 2 * self._chunks * 3 * channels,
                "sums": self._tiles * channels,
            }
        )
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at, tokens = addresses, self._at, np.int32(self._tokens)
        self.pack(addresses)
        self._launch(
            "attend",
            (self._query_tiles, self._heads),
            384,
            *(at[name] for name in ("q", "k", "v", "query_scale", "key_scale", "value_scale", "value_mean")),
            *(0, 0, 0, a["attended"], 0, tokens),
            shared=self._shared,
        )

    def pack(self, a: Mapping[str, int]) -> None:
        at, tokens, chunks = self._at, np.int32(self._tokens), np.int32(self._chunks)
        grid = self._tiles, self._heads
        self._launch("channel_parts", (self._chunks, self._heads, 2), 256, a["k"], a["v"], at["partial"], tokens)
        means = at["key_mean"], at["value_mean"], at["value_scale"]
        self._launch("channels_whole", (self._heads, 2), 128, at["partial"], *means, chunks, tokens)
        self._launch("pack_q", (self._query_tiles, self._heads), 256, a["q"], at["key_mean"], at["q"], at["query_scale"], 0, tokens)
        self._launch("pack_k", grid, 256, a["k"], at["key_mean"], at["k"], at["key_scale"], tokens)
        value = at["value_mean"], at["value_scale"]
        self._launch(
            "pack_v", grid, 256, a["v"], *value, at["v"], at["sums"], tokens, shared=self._value_shared
        )
        if self._centred:
            arguments = at["sums"], *reversed(value), np.int32(self._tiles), tokens
            self._launch("correct_mean", self._heads, 128, *arguments)

    def settle(self) -> None:
        pass


def _compiled(gpu: Gpu, macros: Mapping[str, int], shared: int, value_shared: int) -> Module:
    module = Module(gpu.device, SOURCE, NAMES, macros, accelerated=True)
    module.allow_shared("attend", shared)
    module.allow_shared("pack_v", value_shared)
    return module
