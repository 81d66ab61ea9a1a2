"""Uni3C (addons_spec.md 1.2). Rows of `modulation`: shift, scale, gate of self-attention, then of the FFN."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.block import rotated_heads
from trt_wan.build.models.embed import patch_linear
from trt_wan.build.models.ops import Weights, activation, gelu_tanh, linear, modulated
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan

MASK_CHANNELS = 4  # the first of the condition


def modulation(time_embeddings: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor]:
    given = F.silu(time_embeddings)
    both = torch.cat((linear(given, w, "norm1.linear"), linear(given, w, "norm2.linear")), dim=1)
    return (both.reshape(len(given), 6, -1),)


def patch(
    latent: Tensor,
    condition: Tensor,
    render_latent: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor]:
    whole = torch.cat((latent, condition[:MASK_CHANNELS], render_latent))
    return (linear(patch_linear(whole, w, "controlnet_patch_embedding"), w, "proj_in").float(),)


def block_in(
    z: Tensor,
    modulation: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor, ...]:
    u, tables = model.camera, (rope_cos, rope_sin)
    h = _modulated(z, modulation[:2], w, "norm1.norm", u.norm_eps)
    return rotated_heads(h, w, "self_attn.to_", u.heads, model.transformer.eps, tables, plan)


def block_out(
    z: Tensor, attended: Tensor, modulation: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor, Tensor]:
    z = z + modulation[2] * linear(attended, w, "self_attn.to_out.0")
    h = _modulated(z, modulation[3:5], w, "norm2.norm", model.camera.norm_eps)
    z = z + modulation[5] * linear(gelu_tanh(linear(h, w, "ffn.0").float()), w, "ffn.2")
    return z, z.to(activation(plan))


def add(
    x: Tensor, features: Tensor, strength: Tensor, *, w: Weights, model: ModelConfig, plan: Plan
) -> tuple[Tensor]:
    named = {f"proj_out.{name}": tensor for name, tensor in w.items()}
    return (x + strength * linear(features, named, "proj_out").float(),)


def _modulated(z: Tensor, shift_scale: Tensor, w: Weights, norm: str, eps: float) -> Tensor:
    shift, scale = shift_scale
    return modulated(z, eps, shift, scale, w[f"{norm}.weight"], w[f"{norm}.bias"])
