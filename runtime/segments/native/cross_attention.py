"""Cross-attention by Hopper's own instructions (cross_attention_hopper.cu). Other GPUs use
block.CrossAttention.

Its products are written here: an instruction names all of its registers, so its text depends on its size.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, headers, read_source
from trt_wan.runtime.segments.native.block import Native, macros

MOST_TILE = 128  # keys; with 144, registers do not suffice
ROW_BYTES = 256  # a key's, a value's or a query's
QUERIES = 128  # at once, per block of threads
HOPPER_THREADS = 384
ARRANGING = 1024  # blocks of threads, which stride over the rest
KERNELS = ("arrange_keys", "cross_attention_hopper")

# 64 queries by N keys, 16 channels at a time. The description of a matrix has its address, the bytes from 8
# rows to the next 8 (1024) and, for values, from 64 columns to the next 64 (PTX ISA, wgmma).
PRODUCTS = """
__device__ u64 matrix(u32 address, u32 slab = 16) {
    return (u64)(1 << 30 | 1024 >> 4) << 32 | (slab >> 4) << 16 | address >> 4;
}
template <int N> struct Multiply;
"""
VALUES = """
template <int N>
__device__ void add_values(float (&out)[HEAD_DIM / 8][4], const u32 (&p)[N / 16][4], u32 values, bool add) {
#pragma unroll
    for (int n = 0; n < N / 16; ++n) add_16(out, p[n], matrix(values + n * 2048, N * 128), n > 0 || add);
}
"""


def tiling(keys: int) -> tuple[int, int]:
    """Keys of a tile, a multiple of 16, and the number of equal tiles that hold all keys."""
    tiles = -(-keys // MOST_TILE)
    return -(-keys // (tiles * 16)) * 16, tiles


def multiply(keys: int) -> str:
    """CUDA of Multiply<keys>: both operands are in shared memory."""
    sums = keys // 2
    return f"""
template <> struct Multiply<{keys}> {{
    static __device__ void run(float (&sum)[{keys // 8}][4], u64 a, u64 b, int add) {{
        asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{sums + 2}, 0; wgmma.mma_async.sync.aligned."
                     "m64n{keys}k16.f32.bf16.bf16 {{{_places(0, sums)}}}, "
                     "%{sums}, %{sums + 1}, p, 1, 1, 0, 0; }}"
                     : {_sums(sums)} : "l"(a), "l"(b), "r"(add));
    }}
}};
"""


def add_16(columns: int) -> str:
    """CUDA of add_16: probabilities of 16 keys, in registers, by their values."""
    sums = columns // 2
    return f"""
__device__ void add_16(float (&sum)[{columns // 8}][4], const u32 (&a)[4], u64 b, int add) {{
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{sums + 5}, 0; wgmma.mma_async.sync.aligned."
                 "m64n{columns}k16.f32.bf16.bf16 {{{_places(0, sums)}}}, {{{_places(sums, 4)}}}, "
                 "%{sums + 4}, p, 1, 1, 1; }}"
                 : {_sums(sums)} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}}
"""


def _places(first: int, count: int) -> str:
    return ", ".join(f"%{i}" for i in range(first, first + count))


def _sums(count: int) -> str:
    return ", ".join(f'"+f"(sum[{i // 4}][{i % 4}])' for i in range(count))


def source(model: ModelConfig) -> str:
    sizes = {tiling(keys)[0] for keys in (model.text.length, model.image.tokens)}
    products = (*(multiply(size) for size in sorted(sizes)), add_16(model.transformer.head_dim))
    kernels = read_source(__package__, "cross_attention_hopper.cu")
    return "".join((headers("attention", "hopper"), PRODUCTS, *products, VALUES, kernels))


def hopper_macros(model: ModelConfig) -> dict[str, object]:
    made = {name: value for name, value in macros(model).items() if name in ("DIM", "HEADS", "HEAD_DIM")}
    for name, keys in (("TEXT", model.text.length), ("IMAGE", model.image.tokens)):
        tile, tiles = tiling(keys)
        made |= {f"{name}_KEYS": keys, f"{name}_TILE": tile, f"{name}_TILES": tiles}
    return made


class HopperCrossAttention(Native):
    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        tilings = tiling(model.text.length), tiling(model.image.tokens)
        self._rows = sum(
            tile * tiles for tile, tiles in tilings
        )  # keys of a head, with those that fill tiles
        self._shared = (2 * QUERIES + 4 * max(tile for tile, _ in tilings)) * ROW_BYTES + 12 * 8
        super().__init__(model, plan, gpu)
        self._blocks = gpu.multiprocessors

    def _compiled(self, model: ModelConfig, gpu: Gpu) -> Module:
        module = Module(gpu.device, source(model), KERNELS, hopper_macros(model), accelerated=True)
        module.allow_shared(KERNELS[1], self._shared)
        return module

    def _parts(self) -> dict[str, int]:
        return {"tiles": self.heads * self._rows * 2 * ROW_BYTES}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, tiles = addresses, self._at["tiles"]
        keys: tuple[Any, ...] = a["text_k"], a["text_v"], a["image_k"], a["image_v"]
        self._launch("arrange_keys", ARRANGING, THREADS, *keys, tiles)
        arguments = a["cross_q"], tiles, a["cross_attended"], np.int32(self.tokens)
        self._launch("cross_attention_hopper", self._blocks, HOPPER_THREADS, *arguments, shared=self._shared)
