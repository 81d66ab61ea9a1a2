"""`attn_in` and `attn_out` in FP8 without TensorRT: kernels of block.cu between products of cuBLASLt.

The same arithmetic as the graphs of build/models/block.py, with the same roundings: FP8 operands with a scale
per token, products in bf16, everything between in float32. What a kernel of TensorRT's between two products
costs in several passes over the tokens is one pass here.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import ATTENTION, Module, read_source
from trt_wan.runtime.segments.native.gemm import WORKSPACE_BYTES, CublasLt, Fp8Gemm

VECTOR = 8  # channels of a thread's load
DIM_THREADS, FFN_THREADS = 320, 576  # at most, per token; 288 for the FFN was no slower (docs/log.md)
QUERIES = 128  # of a block of threads in the cross-attention
CROSS_THREADS = 256
CROSS_SHARED_BYTES = 64 << 10  # two tiles of 64 keys and values

SOURCE = ATTENTION + read_source(__package__, "block.cu", "cross_attention.cu")
KERNELS = (
    "modulation_rows",
    "norm_quantize",
    "quantize_tokens",
    "heads_from_products",
    "rms_norm_product",
    "add_norm_quantize",
    "add_gated",
    "gelu_quantize",
    "cross_attention",
)


def threads_for(channels: int, limit: int) -> int:
    """Threads that share a token's channels evenly, as many as the limit allows."""
    vectors = channels // VECTOR
    fitting = [n for n in range(32, min(vectors, limit) + 1, 32) if vectors % n == 0]
    assert fitting and channels % VECTOR == 0, f"{channels} channels cannot be shared by warps"
    return fitting[-1]


def macros(model: ModelConfig) -> dict[str, object]:
    c = model.transformer
    return {
        "DIM": c.dim,
        "FFN": c.ffn_dim,
        "HEADS": c.heads,
        "HEAD_DIM": c.head_dim,
        "EPS": f"{c.eps}f",
        "SOFTMAX_SCALE": f"{c.head_dim**-0.5}f",
        "DIM_THREADS": threads_for(c.dim, DIM_THREADS),
        "FFN_THREADS": threads_for(c.ffn_dim, FFN_THREADS),
    }


class _Kernels:
    """The compiled kernels and the product library of one GPU and model."""

    def __init__(self, gpu: Gpu, model: ModelConfig) -> None:
        self._stream = gpu.stream
        self._module = Module(gpu.device, SOURCE, KERNELS, macros(model))
        self._module.allow_shared("cross_attention", CROSS_SHARED_BYTES)
        self.library = CublasLt()

    def launch(
        self, name: str, grid: int | tuple[int, ...], threads: int, *arguments: Any, shared: int = 0
    ) -> None:
        self._module.launch(self._stream, name, grid, threads, *arguments, shared=shared)


class _Native:
    """What both segments have: sizes, kernels, and their layout of the scratch."""

    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        c = model.transformer
        self.tokens, self.dim, self.ffn, self.heads = plan.tokens, c.dim, c.ffn_dim, c.heads
        assert 2 * c.dim <= c.ffn_dim, "the cross-attention's q does not fit where the hidden layer will be"
        self.text_keys, self.image_keys = model.text.length, model.image.tokens
        self.gpu, self._on = gpu, gpu.once((__name__, model), lambda: _Kernels(gpu, model))
        self._dim_threads = threads_for(c.dim, DIM_THREADS)
        self._ffn_threads = threads_for(c.ffn_dim, FFN_THREADS)
        self._square = Fp8Gemm(gpu, self._on.library, self.tokens, c.dim, c.dim)
        self._offsets, self.scratch_bytes = laid_out(self._parts())
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}

    def settle(self) -> None:
        pass

    def _parts(self) -> dict[str, int]:
        """Bytes of the buffers in the scratch."""
        return {
            "workspace": WORKSPACE_BYTES,
            "modulation": 6 * self.dim * 4,
            "scale": self.tokens * 4,
            "operand": self.tokens * self.dim,
        }

    def _row(self, row: int) -> int:
        """Where a row of modulation is: 0 shift, 1 scale + 1, 2 gate of the attention; then the FFN's."""
        return self._at["modulation"] + row * self.dim * 4

    def _modulate(self, a: Mapping[str, int]) -> None:
        blocks = math.ceil(6 * self.dim / 256)
        arguments = (a["modulation"], a["time_modulation"], self._at["modulation"])
        self._on.launch("modulation_rows", blocks, 256, *arguments)

    def _each_token(self, kernel: str, *arguments: Any) -> None:
        self._on.launch(kernel, self.tokens, self._dim_threads, *arguments)

    def _multiply(self, gemm: Fp8Gemm, operand: str, weight: int, product: str) -> None:
        gemm.enqueue(self._at[operand], weight, self._at[product], self._at["workspace"])


class AttnIn(_Native):
    def _parts(self) -> dict[str, int]:
        products = ("product_q", "product_k", "product_v")
        return super()._parts() | dict.fromkeys(products, self.tokens * self.dim * 2)

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        self._modulate(a)
        self._each_token("norm_quantize", a["x"], self._row(1), self._row(0), at["operand"], at["scale"])
        for name in "qkv":
            self._multiply(self._square, "operand", a[f"self_attn.{name}.weight"], f"product_{name}")
        self._on.launch(
            "heads_from_products",
            (self.tokens, 3),
            self._dim_threads,
            *(at[f"product_{name}"] for name in "qkv"),
            at["scale"],
            *(a[f"self_attn.{name}.scale"] for name in "qkv"),
            *(a[f"self_attn.{name}.bias"] for name in "qkv"),
            *(a["self_attn.norm_q.weight"], a["self_attn.norm_k.weight"]),
            *(a["rope_cos"], a["rope_sin"], a["q"], a["k"], a["v"]),
        )


class AttnOut(_Native):
    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        super().__init__(model, plan, gpu)
        self._up = Fp8Gemm(gpu, self._on.library, self.tokens, self.ffn, self.dim)
        self._down = Fp8Gemm(gpu, self._on.library, self.tokens, self.dim, self.ffn)

    def _parts(self) -> dict[str, int]:
        return super()._parts() | {
            "hidden_scale": self.tokens * 4,
            "hidden": self.tokens * self.ffn,  # FP8; the cross-attention's q waits here before
            "product": self.tokens * self.ffn * 2,
        }

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        x, out = a["x"], a["x_out"]
        operand = at["operand"], at["scale"]

        def product(name: str, scale: str = "scale") -> tuple[int, ...]:
            return at["product"], at[scale], a[f"{name}.scale"], a[f"{name}.bias"]

        self._modulate(a)
        self._each_token("quantize_tokens", a["attended"], *operand)
        self._multiply(self._square, "operand", a["self_attn.o.weight"], "product")
        norm3 = a["norm3.weight"], a["norm3.bias"]
        self._each_token("add_norm_quantize", x, *product("self_attn.o"), self._row(2), out, *norm3, *operand)

        self._multiply(self._square, "operand", a["cross_attn.q.weight"], "product")
        q, attended = at["hidden"], at["product"]
        self._each_token("rms_norm_product", *product("cross_attn.q"), a["cross_attn.norm_q.weight"], q)
        self._on.launch(
            "cross_attention",
            (math.ceil(self.tokens / QUERIES), self.heads),
            CROSS_THREADS,
            *(q, a["text_k"], a["text_v"], np.int32(self.text_keys)),
            *(a["image_k"], a["image_v"], np.int32(self.image_keys), attended, np.int32(self.tokens)),
            shared=CROSS_SHARED_BYTES,
        )
        self._each_token("quantize_tokens", attended, *operand)
        self._multiply(self._square, "operand", a["cross_attn.o.weight"], "product")
        norm2 = self._row(4), self._row(3)
        self._each_token("add_norm_quantize", out, *product("cross_attn.o"), 0, out, *norm2, *operand)

        self._multiply(self._up, "operand", a["ffn.0.weight"], "product")
        hidden = at["hidden"], at["hidden_scale"]
        self._on.launch("gelu_quantize", self.tokens, self._ffn_threads, *product("ffn.0"), *hidden)
        self._multiply(self._down, "hidden", a["ffn.2.weight"], "product")
        self._each_token("add_gated", out, *product("ffn.2", "hidden_scale"), self._row(5), out)


NATIVE: dict[str, type[AttnIn] | type[AttnOut]] = {"attn_in": AttnIn, "attn_out": AttnOut}
