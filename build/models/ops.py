"""Small pieces the graphs share. Tokens are 2-D [tokens, channels], heads [heads, tokens, head_dim], no batch
axis.

Attention is written as MatMul, Softmax, MatMul: TensorRT fuses that form as well as ONNX `Attention`, of
which two in one graph crash its builder (trt_facts.md 1.2).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads·head_dim] to [heads, tokens, head_dim]."""
    return x.reshape(x.shape[0], heads, -1).transpose(0, 1)


def merge_heads(x: Tensor) -> Tensor:
    """[heads, tokens, head_dim] to [tokens, heads·head_dim]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the last two axes."""
    return torch.softmax((q * scale) @ k.transpose(-1, -2), dim=-1) @ v


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
