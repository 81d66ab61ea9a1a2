"""A transformer block, cut before and after each attention: `attn_in`, `attention` (or `sparse_attention`),
`attn_out`, `cross_attention` (or `cross_attention_nag`), `ffn`. `context_kv` runs once per prompt.

Rows of the modulation, in order: shift, scale, gate of self-attention; shift, scale, gate of the FFN
(model_spec.md 1.4).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import (
    MASKED,
    Weights,
    activation,
    attend,
    attend_any,
    gelu_tanh,
    layer_norm,
    linear,
    merge_heads,
    modulated,
    operand,
    project,
    rms_norm,
    split_heads,
)
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts.sparse_attention import BLOCK, QUERIES, block_order
from trt_wan.engines.shape import Plan


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (channels 2k, 2k+1) of [heads, tokens, head_dim]; cos, sin are [tokens, head_dim/2].

    Written token by token, and as a sum of two products instead of a stack of two results. TensorRT then
    norms, rotates, transposes and casts q and k in one kernel. With a stack it wrote both in float32 first.
    """
    x = x.transpose(0, 1)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    by_even, by_odd = torch.stack((cos, sin), dim=-1), torch.stack((-sin, cos), dim=-1)
    rotated: Tensor = pairs[..., :1] * by_even[:, None] + pairs[..., 1:] * by_odd[:, None]
    return rotated.flatten(-2).transpose(0, 1)


def _scaled(norm_weight: Tensor, head_dim: int) -> Tensor:
    """The weight of q's norm times the softmax scale, so that no attention has to multiply."""
    scaled: Tensor = norm_weight * head_dim**-0.5
    return scaled


def context_kv(
    text_tokens: Tensor, image_tokens: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor, ...]:
    c = model.transformer
    text, image = operand(text_tokens, w["k.weight"]), operand(image_tokens, w["k_img.weight"])
    text_k = rms_norm(project(text, w, "k"), w["norm_k.weight"], c.eps)
    image_k = rms_norm(project(image, w, "k_img"), w["norm_k_img.weight"], c.eps)
    kv = (text_k, project(text, w, "v"), image_k, project(image, w, "v_img"))
    return tuple(split_heads(t, c.heads).to(activation(plan)) for t in kv)


def attn_in(
    x: Tensor,
    time_modulation: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor, ...]:
    c = model.transformer
    shift, scale = (w["modulation"][0] + time_modulation)[:2]
    h = modulated(x, c.eps, shift, scale)
    return rotated_heads(h, w, "self_attn.", c.heads, c.eps, (rope_cos, rope_sin), plan)


def rotated_heads(
    h: Tensor, w: Weights, layers: str, heads: int, eps: float, tables: tuple[Tensor, Tensor], plan: Plan
) -> tuple[Tensor, ...]:
    """q times the softmax scale, k and v of self-attention, [heads, tokens, head_dim] each. `layers` is what
    the names of their layers begin with.
    """
    given = operand(h, w[f"{layers}q.weight"])
    head_dim = w["self_attn.norm_q.weight"].shape[0] // heads
    q = rms_norm(project(given, w, f"{layers}q"), _scaled(w["self_attn.norm_q.weight"], head_dim), eps)
    k = rms_norm(project(given, w, f"{layers}k"), w["self_attn.norm_k.weight"], eps)
    q, k = (rope(split_heads(t, heads), *tables) for t in (q, k))
    v = split_heads(project(given, w, f"{layers}v"), heads)
    return tuple(t.to(activation(plan)) for t in (q, k, v))


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor]:
    return (merge_heads(attend(q, k, v)),)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor]:
    """Dense, in float32, with a key for each block of keys that a block of queries skips: its mean."""
    heads, tokens, _ = q.shape
    order = torch.from_numpy(block_order(plan)).long()
    q, k, v = (x[:, order].float() for x in (q, k, v))
    mean_k, mean_v = block_means(k), block_means(v)
    reference = -(-plan.undivided.tokens_per_slot // BLOCK)  # its blocks
    kept = kept_blocks(block_means(q, QUERIES) @ mean_k.transpose(1, 2), keep, reference)
    blocks = kept.shape[-1]
    by_token = kept[:, :, None].expand(-1, -1, QUERIES, -1).reshape(heads, -1, blocks)[:, :tokens]
    by_key = by_token[..., None].expand(-1, -1, -1, BLOCK).reshape(heads, tokens, -1)[..., :tokens]
    scores = torch.where(by_key, q @ k.transpose(1, 2), MASKED)
    others = torch.where(by_token, MASKED, q @ mean_k.transpose(1, 2) + math.log(BLOCK))
    attended = torch.softmax(torch.cat((scores, others), -1), -1) @ torch.cat((v, mean_v), 1)
    inverse = torch.from_numpy(block_order(plan).argsort())
    return (merge_heads(attended)[inverse].to(activation(plan)),)


def block_means(x: Tensor, block: int = BLOCK) -> Tensor:
    """[heads, blocks, head_dim] of [heads, tokens, head_dim]; the last block may be short."""
    heads, tokens, size = x.shape
    missing = -tokens % block
    sums = F.pad(x, (0, 0, 0, missing)).reshape(heads, -1, block, size).sum(2)
    counts = [block] * (sums.shape[1] - 1) + [block - missing]
    return sums / torch.tensor(counts, dtype=torch.float32)[:, None]


def kept_blocks(scores: Tensor, keep: Tensor, first: int) -> Tensor:
    """Whether a block of queries keeps a block of keys, bool [heads, query blocks, key blocks]. `first`
    blocks are the reference's. Where scores are equal, the lower number is kept.
    """
    numbers, start = torch.arange(scores.shape[-1]), QUERIES * torch.arange(scores.shape[-2])[:, None]
    own = (BLOCK * numbers < start + QUERIES) & (start < BLOCK * (numbers + 1))
    always = (numbers < first) | (numbers == len(numbers) - 1) | own
    scores = scores.masked_fill(always, torch.inf)
    mine, other = scores[..., None], scores[..., None, :]
    before = (other > mine) | ((other == mine) & (numbers < numbers[:, None]))
    wanted = torch.maximum(torch.round(keep * len(numbers)), always.sum(1).float())
    return before.sum(-1) < wanted[:, None]


def attn_out(
    x: Tensor, attended: Tensor, time_modulation: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor, Tensor]:
    c = model.transformer
    gate = (w["modulation"][0] + time_modulation)[2]
    x = x + gate * linear(attended, w, "self_attn.o")
    h = layer_norm(x, c.eps, w["norm3.weight"], w["norm3.bias"])
    q = rms_norm(linear(h, w, "cross_attn.q"), _scaled(w["cross_attn.norm_q.weight"], c.head_dim), c.eps)
    return x, q.to(activation(plan))


def cross_attention(
    cross_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor]:
    q = split_heads(cross_q, model.transformer.heads)
    return (merge_heads(attend(q, text_k, text_v) + attend_any(q, image_k, image_v)),)


def cross_attention_nag(
    cross_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    nag_k: Tensor,
    nag_v: Tensor,
    nag_scale: Tensor,
    nag_tau: Tensor,
    nag_alpha: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor]:
    q = split_heads(cross_q, model.transformer.heads)
    positive, negative = (merge_heads(attend(q, k, v)).float() for k, v in ((text_k, text_v), (nag_k, nag_v)))
    text = normalised_guidance(positive, negative, nag_scale, nag_tau, nag_alpha)
    return ((text + merge_heads(attend_any(q, image_k, image_v)).float()).to(activation(plan)),)


def normalised_guidance(
    positive: Tensor, negative: Tensor, scale: Tensor, tau: Tensor, alpha: Tensor
) -> Tensor:
    """NAG in float32 on [tokens, channels]; a token's norm is over all heads (addons_spec.md 3)."""
    guided = scale * positive - (scale - 1) * negative
    size, usual = (x.abs().sum(-1, keepdim=True) for x in (guided, positive))
    guided = guided * (tau * usual / (size + 1e-7)).clamp_max(1)
    return alpha * guided + (1 - alpha) * positive


def ffn(
    x: Tensor, cross_attended: Tensor, time_modulation: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor]:
    shift, scale, gate = (w["modulation"][0] + time_modulation)[3:]
    x = x + linear(cross_attended, w, "cross_attn.o")
    h = modulated(x, model.transformer.eps, shift, scale)
    return (x + gate * linear(gelu_tanh(linear(h, w, "ffn.0").float()), w, "ffn.2"),)
