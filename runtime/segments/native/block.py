"""A block without its self-attention, in FP8 or int8 without TensorRT: native kernels between products of
cuBLASLt.

In FP8 the arithmetic and its roundings are those of the graphs in build/models/block.py: operands with a
scale per token, products in bf16, all other numbers in float32. Between two products these kernels read the
tokens once, TensorRT's several times. In int8, where the graphs keep the tokens in bf16, they are rotated
(engines/int8.py) and quantised in the same pass, and products are int32.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

from trt_wan.engines.config import FACE_TOKENS, ModelConfig
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import ATTENTION, Module, read_source
from trt_wan.runtime.segments.native.gemm import (
    WORKSPACE_BYTES,
    Bf16Gemm,
    CublasLt,
    Fp8Gemm,
    Gemm,
    Int8Gemm,
    Product,
)

Operands = Literal["bf16", "fp8", "int8"]  # types that products take

VECTOR = 8  # channels that a thread loads at once
DIM_THREADS, FFN_THREADS = 320, 864  # at most, per token
# Blocks of heads_from_products per multiprocessor. Products of int8 take the registers of two.
HEADS_BLOCKS = {"int8": 1, "fp8": 2, "bf16": 2}
QUERIES = 128  # per block of threads in the cross-attention
CROSS_THREADS = 256
CROSS_SHARED_BYTES = 64 << 10  # two tiles of 64 keys and values

SOURCE = ATTENTION + read_source(__package__, "block.cu", "fuser.cu", "cross_attention.cu")
KERNELS = (
    "modulation_rows",
    "norm_quantize",
    "quantize_tokens",
    "heads_from_products",
    "rms_norm_product",
    "add_norm_quantize",
    "add_gated",
    "gelu_quantize",
    "face_attention",
    "norm_tokens",
    "add_face",
    "cross_attention",
)


def threads_for(channels: int, limit: int) -> int:
    """Threads that share a token's channels evenly, as many as the limit allows."""
    vectors = channels // VECTOR
    fitting = [n for n in range(32, min(vectors, limit) + 1, 32) if vectors % n == 0]
    assert fitting and channels % VECTOR == 0, f"{channels} channels cannot be shared by warps"
    return fitting[-1]


def macros(model: ModelConfig, operands: Operands = "fp8") -> dict[str, object]:
    c = model.transformer
    kind = {"INT8": 1} if operands == "int8" else {}
    return kind | {
        "DIM": c.dim,
        "FFN": c.ffn_dim,
        "HEADS": c.heads,
        "HEAD_DIM": c.head_dim,
        "EPS": f"{c.eps}f",
        "SOFTMAX_SCALE": f"{c.head_dim**-0.5}f",
        "FACE_TOKENS": FACE_TOKENS,
        "DIM_THREADS": threads_for(c.dim, DIM_THREADS),
        "HEADS_BLOCKS": HEADS_BLOCKS[operands],
        "FFN_THREADS": threads_for(c.ffn_dim, FFN_THREADS),
    }


class Native:
    """Sizes, kernels, and the layout of the scratch.

    Nothing in the scratch survives a segment: all that another segment needs is an output.
    """

    operands: Operands = "fp8"

    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        c = model.transformer
        self.tokens, self.dim, self.ffn, self.heads = plan.tokens, c.dim, c.ffn_dim, c.heads
        self.text_keys, self.image_keys = model.text.length, model.image.tokens
        key = self._compiled.__qualname__, model, self.operands == "int8"
        module = gpu.once(key, lambda: self._compiled(model, gpu))
        self._launch = partial(module.launch, gpu.stream)
        self._offsets, self.scratch_bytes = laid_out(self._parts())
        self._at: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._at = {name: scratch + offset for name, offset in self._offsets.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        pass

    def _compiled(self, model: ModelConfig, gpu: Gpu) -> Module:
        module = Module(gpu.device, SOURCE, KERNELS, macros(model, self.operands))
        module.allow_shared("cross_attention", CROSS_SHARED_BYTES)
        return module

    def _parts(self) -> dict[str, int]:
        """Bytes of the buffers in the scratch."""
        return {}


class Linear(Native):
    """Steps of the segments with matrix products."""

    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        super().__init__(model, plan, gpu)
        self._dim_threads = threads_for(self.dim, DIM_THREADS)
        self._square = self._gemm(gpu, self.dim, self.dim)

    def _parts(self) -> dict[str, int]:
        return {
            "workspace": WORKSPACE_BYTES,
            "scale": self.tokens * 4,
            "operand": self.tokens * self.dim * (2 if self.operands == "bf16" else 1),
        }

    @property
    def _product_bytes(self) -> int:
        """Bytes of a number."""
        return 4 if self.operands == "int8" else 2

    def _each_token(self, kernel: str, *arguments: Any) -> None:
        self._launch(kernel, self.tokens, self._dim_threads, *arguments)

    def _quantize(self, values: int) -> None:
        self._each_token("quantize_tokens", values, self._at["operand"], self._at["scale"])

    def _gemm(self, gpu: Gpu, out: int, inner: int) -> Gemm:
        library = gpu.once(CublasLt, CublasLt)
        if self.operands == "bf16":
            return Bf16Gemm(gpu, library, Product(self.tokens, out, inner))
        kind = Int8Gemm if self.operands == "int8" else Fp8Gemm
        return kind(gpu, library, self.tokens, out, inner)

    def _multiply(self, gemm: Gemm, operand: str, weight: int, product: str) -> None:
        gemm.enqueue(self._at[operand], weight, self._at[product], self._at["workspace"])

    def _product(self, a: Mapping[str, int], name: str, scale: str = "scale") -> tuple[int, ...]:
        """A finished product as the kernels take it: values, scales of tokens and of the weight, bias."""
        return self._at["product"], self._at[scale], a[f"{name}.scale"], a[f"{name}.bias"]


class _Modulated(Linear):
    """Parts of a block."""

    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        self.operands = "int8" if plan.precision == "int8" else "fp8"
        super().__init__(model, plan, gpu)

    def _parts(self) -> dict[str, int]:
        return super()._parts() | {"modulation": 6 * self.dim * 4}

    def _row(self, row: int) -> int:
        """Address of a modulation row: 0 shift, 1 scale + 1, 2 gate of self-attention; 3 to 5 the FFN's."""
        return self._at["modulation"] + row * self.dim * 4

    def _modulate(self, a: Mapping[str, int]) -> None:
        blocks = math.ceil(6 * self.dim / 256)
        arguments = (a["modulation"], a["time_modulation"], self._at["modulation"])
        self._launch("modulation_rows", blocks, 256, *arguments)


class AttnIn(_Modulated):
    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        super().__init__(model, plan, gpu)
        self._heads_blocks = HEADS_BLOCKS[self.operands] * gpu.multiprocessors

    def _parts(self) -> dict[str, int]:
        products = ("product_q", "product_k", "product_v")
        return super()._parts() | dict.fromkeys(products, self.tokens * self.dim * self._product_bytes)

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        self._modulate(a)
        self._each_token("norm_quantize", a["x"], self._row(1), self._row(0), at["operand"], at["scale"])
        for name in "qkv":
            self._multiply(self._square, "operand", a[f"self_attn.{name}.weight"], f"product_{name}")
        self._launch(
            "heads_from_products",
            (self._heads_blocks, 3),
            self._dim_threads,
            *(at[f"product_{name}"] for name in "qkv"),
            at["scale"],
            *(a[f"self_attn.{name}.scale"] for name in "qkv"),
            *(a[f"self_attn.{name}.bias"] for name in "qkv"),
            *(a["self_attn.norm_q.weight"], a["self_attn.norm_k.weight"]),
            *(a["rope_cos"], a["rope_sin"], a["q"], a["k"], a["v"], np.int32(self.tokens)),
        )


class AttnOut(_Modulated):
    def _parts(self) -> dict[str, int]:
        return super()._parts() | {"product": self.tokens * self.dim * self._product_bytes}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        operand = at["operand"], at["scale"]
        self._modulate(a)
        self._quantize(a["attended"])
        self._multiply(self._square, "operand", a["self_attn.o.weight"], "product")
        product, norm3 = self._product(a, "self_attn.o"), (a["norm3.weight"], a["norm3.bias"])
        self._each_token("add_norm_quantize", a["x"], *product, self._row(2), a["x_out"], *norm3, *operand)
        self._multiply(self._square, "operand", a["cross_attn.q.weight"], "product")
        product = self._product(a, "cross_attn.q")
        self._each_token("rms_norm_product", *product, a["cross_attn.norm_q.weight"], a["cross_q"])


class CrossAttention(Native):
    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a = addresses
        self._launch(
            "cross_attention",
            (math.ceil(self.tokens / QUERIES), self.heads),
            CROSS_THREADS,
            *(a["cross_q"], a["text_k"], a["text_v"], np.int32(self.text_keys)),
            *(a["image_k"], a["image_v"], np.int32(self.image_keys)),
            *(a["cross_attended"], np.int32(self.tokens)),
            shared=CROSS_SHARED_BYTES,
        )


class Ffn(_Modulated):
    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        super().__init__(model, plan, gpu)
        self._ffn_threads = threads_for(self.ffn, FFN_THREADS)
        self._up = self._gemm(gpu, self.ffn, self.dim)
        self._down = self._gemm(gpu, self.dim, self.ffn)

    def _parts(self) -> dict[str, int]:
        return super()._parts() | {
            "hidden_scale": self.tokens * 4,
            "hidden": self.tokens * self.ffn,  # 8 bits
            "product": self.tokens * self.ffn * self._product_bytes,
        }

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at, out = addresses, self._at, addresses["x_out"]
        operand, hidden = (at["operand"], at["scale"]), (at["hidden"], at["hidden_scale"])
        self._modulate(a)
        self._quantize(a["cross_attended"])
        self._multiply(self._square, "operand", a["cross_attn.o.weight"], "product")
        product, norm2 = self._product(a, "cross_attn.o"), (self._row(4), self._row(3))
        self._each_token("add_norm_quantize", a["x"], *product, 0, out, *norm2, *operand)

        self._multiply(self._up, "operand", a["ffn.0.weight"], "product")
        product = self._product(a, "ffn.0")
        self._launch("gelu_quantize", self.tokens, self._ffn_threads, *product, *hidden)
        self._multiply(self._down, "hidden", a["ffn.2.weight"], "product")
        product = self._product(a, "ffn.2", "hidden_scale")
        self._each_token("add_gated", out, *product, self._row(5), out)


PARTS: dict[str, type[Native]] = {"attn_in": AttnIn, "attn_out": AttnOut, "ffn": Ffn}
