"""One layer of the umT5 encoder: attention with a relative bias, then a gated GELU (model_spec.md 8.1).

umT5 does not scale its logits, has no biases, and every layer has a bias table of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import Weights, gelu_tanh, merge_heads, rms_norm, split_heads
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.plan import Plan


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
    h = rms_norm(hidden, w["0.layer_norm.weight"], t.eps)
    q, k, v = (split_heads(F.linear(h, w[f"0.SelfAttention.{name}.weight"]), t.heads) for name in "qkv")
    table = w["0.SelfAttention.relative_attention_bias.weight"].t()  # [heads, buckets]
    position_bias = table.index_select(1, position_buckets.flatten()).reshape(t.heads, t.length, t.length)
    weights = torch.softmax(q @ k.transpose(-1, -2) + position_bias + attention_bias, dim=-1)
    hidden = hidden + F.linear(merge_heads(weights @ v), w["0.SelfAttention.o.weight"])

    h = rms_norm(hidden, w["1.layer_norm.weight"], t.eps)
    gate = gelu_tanh(F.linear(h, w["1.DenseReluDense.wi_0.weight"]))
    up = F.linear(h, w["1.DenseReluDense.wi_1.weight"])
    return (hidden + F.linear(gate * up, w["1.DenseReluDense.wo.weight"]),)
