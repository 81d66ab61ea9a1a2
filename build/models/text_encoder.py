"""One layer of the umT5 encoder: attention with a relative bias, then a gated GELU (model_spec.md 8.1).

umT5 does not scale its logits, its linear layers have no biases, and each layer has its own bias table.
"""

import torch
from torch import Tensor

from trt_wan.build.models.ops import (
    Weights,
    gelu_tanh,
    linear,
    merge_heads,
    operand,
    project,
    rms_norm,
    split_heads,
)
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan


def layer(
    hidden: Tensor,
    attention_bias: Tensor,
    position_buckets: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor]:
    t = model.text
    attention, ffn = "0.SelfAttention", "1.DenseReluDense"
    h = operand(rms_norm(hidden, w["0.layer_norm.weight"], t.eps), w[f"{attention}.q.weight"])
    q, k, v = (split_heads(project(h, w, f"{attention}.{name}"), t.heads) for name in "qkv")
    table = w[f"{attention}.relative_attention_bias.weight"].t()  # [heads, buckets]
    position_bias = table.index_select(1, position_buckets.flatten()).reshape(t.heads, t.length, t.length)
    logits = (q @ k.transpose(-1, -2)).float() + position_bias + attention_bias
    attended = merge_heads(torch.softmax(logits, dim=-1).to(v.dtype) @ v)
    hidden = hidden + linear(attended, w, f"{attention}.o")

    h = operand(rms_norm(hidden, w["1.layer_norm.weight"], t.eps), w[f"{ffn}.wi_0.weight"])
    gated = gelu_tanh(project(h, w, f"{ffn}.wi_0").float()) * project(h, w, f"{ffn}.wi_1")
    return (hidden + linear(gated, w, f"{ffn}.wo"),)
