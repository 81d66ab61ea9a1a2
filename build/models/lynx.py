"""Lynx: the resampler, the adapters' keys and values, and the attentions that they add (addons_spec.md 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.block import rope
from trt_wan.build.models.embed import patch_linear
from trt_wan.build.models.ops import (
    Weights,
    activation,
    attend,
    layer_norm,
    linear,
    merge_heads,
    modulated,
    rms_norm,
    split_heads,
)
from trt_wan.build.models.vae import normalised, walk
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import vae_layers
from trt_wan.engines.lynx import FacePlan, LynxPlan, lynx_of

LITE_EPS = 1e-5  # for the lite adapter's keys, whose norm has no weight
LOG_VARIANCE = (-30.0, 20.0)  # as the VAE's distribution is clamped (diffusers)


def _normed(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return layer_norm(x, eps, w[f"{name}.weight"], w[f"{name}.bias"])


def resampler(face: Tensor, *, w: Weights, model: ModelConfig, plan: LynxPlan) -> tuple[Tensor]:
    c = lynx_of(model)
    x, z = linear(face, w, "proj_in"), w["latents"][0]
    for layer in range(c.layers):
        attention, feed = f"layers.{layer}.0", f"layers.{layer}.1"
        seen, asking = _normed(x, w, f"{attention}.norm1", c.eps), _normed(z, w, f"{attention}.norm2", c.eps)
        q = linear(asking, w, f"{attention}.to_q") * c.head_dim**-0.5
        k, v = linear(torch.cat((seen, asking)), w, f"{attention}.to_kv").chunk(2, dim=-1)
        q, k, v = (split_heads(t, c.heads) for t in (q, k, v))
        z = z + linear(merge_heads(attend(q, k, v)), w, f"{attention}.to_out")
        hidden = F.gelu(linear(_normed(z, w, f"{feed}.0", c.eps), w, f"{feed}.1"))
        z = z + linear(hidden, w, f"{feed}.3")
    return (_normed(linear(z, w, "proj_out"), w, "norm_out", c.eps),)


def ip_kv(ip_tokens: Tensor, *, w: Weights, model: ModelConfig, plan: LynxPlan) -> tuple[Tensor, Tensor]:
    heads = model.transformer.heads
    tokens = torch.cat((ip_tokens, w["registers"][0])) if plan.kind == "full" else ip_tokens
    k, v = (linear(tokens, w, name).float() for name in ("to_k_ip", "to_v_ip"))
    v = split_heads(v, heads).to(activation(plan))
    if plan.kind == "full":
        return k, v
    k = rms_norm(k, torch.ones(()), LITE_EPS)
    return split_heads(k, heads).to(activation(plan)), v


def ip_norm(ip_keys: Tensor, *, w: Weights, model: ModelConfig, plan: LynxPlan) -> tuple[Tensor]:
    return _finished(ip_keys, w, model, plan)


def ref_norm(ref_keys: Tensor, *, w: Weights, model: ModelConfig, plan: FacePlan) -> tuple[Tensor]:
    return _finished(ref_keys, w, model, plan)


def _finished(keys: Tensor, w: Weights, model: ModelConfig, plan: LynxPlan | FacePlan) -> tuple[Tensor]:
    c = model.transformer
    return (split_heads(rms_norm(keys, w["norm_k.weight"], c.eps), c.heads).to(activation(plan)),)


def ip(
    cross_q: Tensor,
    cross_attended: Tensor,
    ip_k: Tensor,
    ip_v: Tensor,
    ip_scale: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: LynxPlan,
) -> tuple[Tensor]:
    face = merge_heads(attend(split_heads(cross_q, model.transformer.heads), ip_k, ip_v))
    return ((cross_attended.float() + ip_scale * face.float()).to(activation(plan)),)


def face_encode(
    frames: Tensor, noise: Tensor, *, w: Weights, model: ModelConfig, plan: FacePlan
) -> tuple[Tensor]:
    moments, *_ = walk(frames, None, w, vae_layers.encoder(model.vae), plan)
    mean, log_variance = moments.chunk(2)
    deviation = torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE))
    return (normalised(mean + deviation * noise),)


def face_embed(latent: Tensor, *, w: Weights, model: ModelConfig, plan: FacePlan) -> tuple[Tensor]:
    own = {
        "patch_embedding.weight": w["patch_embedding.weight"][:, : latent.shape[0]],
        "patch_embedding.bias": w["patch_embedding.bias"],
    }
    return (patch_linear(latent, own, "patch_embedding"),)


def features(
    x: Tensor, time_modulation: Tensor, *, w: Weights, model: ModelConfig, plan: FacePlan
) -> tuple[Tensor]:
    shift, scale = (w["modulation"][0] + time_modulation)[:2]
    return (modulated(x, model.transformer.eps, shift, scale),)


def ref_kv(features: Tensor, *, w: Weights, model: ModelConfig, plan: FacePlan) -> tuple[Tensor, Tensor]:
    k, v = (linear(features, w, name).float() for name in ("to_k_ref", "to_v_ref"))
    return k, split_heads(v, model.transformer.heads).to(activation(plan))


def ref(
    q: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    attended: Tensor,
    ref_k: Tensor,
    ref_v: Tensor,
    ref_scale: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: LynxPlan,
) -> tuple[Tensor]:
    plain = rope(q, rope_cos, -rope_sin).to(activation(plan))  # the rotation back
    face = merge_heads(attend(plain, ref_k, ref_v))
    return ((attended.float() + ref_scale * face.float()).to(activation(plan)),)
