"""A transformer block, cut at self-attention: `attn_in`, `attention`, `attn_out`, and `context_kv`, which
runs once.

Modulation rows, in order: shift, scale, gate of the attention; shift, scale, gate of the FFN (model_spec.md
1.4).
"""

import torch
from torch import Tensor

from trt_wan.build.models.ops import (
    Weights,
    attend,
    gelu_tanh,
    layer_norm,
    linear,
    merge_heads,
    rms_norm,
    split_heads,
)
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.plan import Plan


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (channels 2k, 2k+1) of [heads, tokens, head_dim]; cos, sin are [tokens, head_dim/2]."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def context_kv(
    text_tokens: Tensor, image_tokens: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = model.transformer
    text_k = rms_norm(linear(text_tokens, w, "k"), w["norm_k.weight"], c.eps)
    image_k = rms_norm(linear(image_tokens, w, "k_img"), w["norm_k_img.weight"], c.eps)
    return (
        split_heads(text_k, c.heads),
        split_heads(linear(text_tokens, w, "v"), c.heads),
        split_heads(image_k, c.heads),
        split_heads(linear(image_tokens, w, "v_img"), c.heads),
    )


def attn_in(
    x: Tensor,
    time_modulation: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    c = model.transformer
    shift, scale = (w["modulation"][0] + time_modulation)[:2]
    h = layer_norm(x, c.eps) * (1 + scale) + shift
    q = rms_norm(linear(h, w, "self_attn.q"), w["self_attn.norm_q.weight"], c.eps)
    k = rms_norm(linear(h, w, "self_attn.k"), w["self_attn.norm_k.weight"], c.eps)
    v = linear(h, w, "self_attn.v")
    q, k, v = (split_heads(t, c.heads) for t in (q, k, v))
    return _rope(q, rope_cos, rope_sin), _rope(k, rope_cos, rope_sin), v


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor]:
    return (merge_heads(attend(q, k, v, model.transformer.head_dim**-0.5)),)


def attn_out(
    x: Tensor,
    attended: Tensor,
    time_modulation: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor]:
    c = model.transformer
    gate, shift, scale, ffn_gate = (w["modulation"][0] + time_modulation)[2:]
    x = x + gate * linear(attended, w, "self_attn.o")

    h = layer_norm(x, c.eps, w["norm3.weight"], w["norm3.bias"])
    q = rms_norm(linear(h, w, "cross_attn.q"), w["cross_attn.norm_q.weight"], c.eps)
    q = split_heads(q, c.heads)
    softmax_scale = c.head_dim**-0.5
    context = attend(q, text_k, text_v, softmax_scale) + attend(q, image_k, image_v, softmax_scale)
    x = x + linear(merge_heads(context), w, "cross_attn.o")

    h = layer_norm(x, c.eps) * (1 + scale) + shift
    return (x + ffn_gate * linear(gelu_tanh(linear(h, w, "ffn.0")), w, "ffn.2"),)
