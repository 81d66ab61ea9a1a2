"""Small pieces the graphs share. Tokens are 2-D [tokens, channels], heads [heads, tokens, head_dim], no batch
axis.

Attention is written as MatMul, Softmax, MatMul. TensorRT fuses that form as well as ONNX `Attention`, and two
`Attention` nodes in one graph crash its builder (trt_facts.md 1.2).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.engines.fp8 import E4M3_MAX
from trt_wan.engines.int8 import GROUP, hadamard
from trt_wan.engines.precision import PRECISIONS
from trt_wan.engines.shape import Plan

Weights = Mapping[str, Tensor]

# FP8 Q/DQ with bf16 needs 21 and bf16 convolutions 22; from 23 on, attention nodes appear that crash TensorRT
# (trt_facts.md 1.2).
OPSET = 22

MASKED = -30000.0  # e^-30000 is 0 beside any logit, and bf16 holds it


def activation(plan: Plan) -> torch.dtype:
    """The type of the tensors that pass between the parts of a block."""
    return torch.bfloat16 if PRECISIONS[plan.precision].activation == "bfloat16" else torch.float32


class Operand(NamedTuple):
    """The left side of matrix products: values in the weights' type or bf16, and the scale of FP8 values."""

    values: Tensor
    scale: Tensor | None = None


def operand(x: Tensor, weight: Tensor) -> Operand:
    """`x` [tokens, channels] made ready for weights of `weight`'s type; FP8 gets a scale per token. For int8
    it is rotated as the weights are, and stays in bf16.
    """
    if weight.dtype == torch.int8:
        turned = x.to(torch.bfloat16).reshape(-1, GROUP) @ torch.from_numpy(hadamard(GROUP)).bfloat16()
        return Operand(turned.reshape(x.shape))
    if weight.dtype != torch.float8_e4m3fn:
        return Operand(x.to(weight.dtype))
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-10)
    return Operand(_values(_fp8(x * (E4M3_MAX / largest))), largest * (1 / E4M3_MAX))


def project(x: Operand, w: Weights, name: str) -> Tensor:
    """A linear layer [out, in], with its bias if it has one.

    TensorRT keeps an FP8 GEMM only if the scales of its Q/DQ nodes are constants. They are 1; the scales of
    tokens and weights are multiplied outside (trt_facts.md 2.3). Returns float32 for weights of 8 bits,
    otherwise their type.
    """
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    if weight.dtype not in (torch.float8_e4m3fn, torch.int8):
        return F.linear(x.values, weight, None if bias is None else bias.to(weight.dtype))
    y = (x.values @ _values(weight).t()).float()
    y = y * (w[f"{name}.scale"] if x.scale is None else x.scale * w[f"{name}.scale"])
    return y if bias is None else y + bias


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return project(operand(x, w[f"{name}.weight"]), w, name)


def _fp8(x: Tensor) -> Tensor:
    """QuantizeLinear with scale 1: saturates, unlike a cast."""
    one = torch.ones((), dtype=x.dtype)
    zero = torch.zeros((), dtype=torch.float32).to(torch.float8_e4m3fn)
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, one, zero), dtype=torch.float8_e4m3fn, shape=x.shape, version=OPSET
    )


def _values(x: Tensor) -> Tensor:
    """DequantizeLinear with scale 1: the bf16 numbers that FP8 or int8 values are."""
    one = torch.ones((), dtype=torch.bfloat16)
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (x, one), dtype=torch.bfloat16, shape=x.shape, version=OPSET
    )


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """In float32."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def modulated(x: Tensor, eps: float, shift: Tensor, scale: Tensor, *weight_and_bias: Tensor) -> Tensor:
    return layer_norm(x, eps, *weight_and_bias) * (1 + scale) + shift


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computed and returned in float32 for every type of x."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads·head_dim] to [heads, tokens, head_dim]."""
    return x.reshape(x.shape[0], heads, -1).transpose(0, 1)


def merge_heads(x: Tensor) -> Tensor:
    """[heads, tokens, head_dim] to [tokens, heads·head_dim]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ) v over the last two axes; q comes multiplied by head_dim^-0.5."""
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


def attend_any(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` for any number of keys: fills up to a multiple of 8 with keys whose weight is exactly 0.

    For CLIP's 257 keys, TensorRT-RTX's fused attention for SM89 is wrong by 9 %, and its build for the H200
    does not fuse at all (docs/log.md).
    """
    missing = -k.shape[-2] % 8
    if not missing:
        return attend(q, k, v)
    k, v = (torch.cat((t, t.new_zeros(*t.shape[:-2], missing, t.shape[-1])), dim=-2) for t in (k, v))
    mask = torch.zeros(k.shape[-2], dtype=q.dtype)
    mask[-missing:] = MASKED
    return torch.softmax(q @ k.transpose(-1, -2) + mask, dim=-1) @ v


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
