"""Lynx on diffusers' transformer, written from addons_spec.md 2.4: none of it is taken from build/models.

The attentions of diffusers' blocks are replaced by these here, which add the adapters. Arrays have a batch
axis of 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanAnimateTransformer3DModel
from torch import Tensor

from trt_wan.runtime.executors import Array

Weights = Mapping[str, Array]


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def tensor(weights: Weights, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(weights[name]))


def dense(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ tensor(weights, f"{name}.weight").T
    return y + tensor(weights, f"{name}.bias") if f"{name}.bias" in weights else y


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    scale, shift = tensor(weights, f"{name}.weight"), tensor(weights, f"{name}.bias")
    return F.layer_norm(x, x.shape[-1:], scale, shift, 1e-5)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q [n, dim], k and v [m, dim]; plain softmax attention of every head."""
    q, k, v = (t.reshape(len(t), heads, -1).permute(1, 0, 2) for t in (q, k, v))
    weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
    return (weights @ v).permute(1, 0, 2).reshape(q.shape[1], -1)


def resample(weights: Weights, face: Tensor, heads: int) -> Tensor:
    """face [1, 512] to tokens."""
    x, z = dense(weights, "proj_in", face), tensor(weights, "latents")[0]
    layer = 0
    while f"layers.{layer}.0.to_q.weight" in weights:
        name = f"layers.{layer}"
        seen, asking = norm(weights, f"{name}.0.norm1", x), norm(weights, f"{name}.0.norm2", z)
        k, v = dense(weights, f"{name}.0.to_kv", torch.cat([seen, asking])).chunk(2, -1)
        attended = attend(dense(weights, f"{name}.0.to_q", asking), k, v, heads)
        z = z + dense(weights, f"{name}.0.to_out", attended)
        inner = F.gelu(dense(weights, f"{name}.1.1", norm(weights, f"{name}.1.0", z)))
        z = z + dense(weights, f"{name}.1.3", inner)
        layer += 1
    return norm(weights, "norm_out", dense(weights, "proj_out", z))


@dataclass
class SelfAttention:
    """`ref` are the adapter's weights of this block, `features` those of the face, [256, dim]."""

    ref: Weights | None = None
    features: Tensor | None = None
    scale: float = 1.0
    seen: Tensor | None = None

    def __call__(self, attn: Any, hidden: Tensor, context: Any, mask: Any, rotary: Any) -> Tensor:
        self.seen = hidden[0]
        cos, sin = rotary[0][0, :, 0, 0::2], rotary[1][0, :, 0, 1::2]
        turn = torch.complex(cos, sin)[:, None]
        q, k = attn.norm_q(attn.to_q(hidden))[0], attn.norm_k(attn.to_k(hidden))[0]

        def turned(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.reshape(len(x), attn.heads, -1, 2).contiguous())
            return torch.view_as_real(pairs * turn).reshape(len(x), -1)

        y = attend(turned(q), turned(k), attn.to_v(hidden)[0], attn.heads)
        if self.ref is not None and self.features is not None:
            keys = attn.norm_k(dense(self.ref, "to_k_ref", self.features))
            y = y + self.scale * attend(q, keys, dense(self.ref, "to_v_ref", self.features), attn.heads)
        return attn.to_out[0](y)[None]


@dataclass
class CrossAttention:
    """`tokens` [4, …] are the resampler's. `image`: whether the block attends to image tokens too."""

    ip: Weights | None = None
    tokens: Tensor | None = None
    scale: float = 1.0
    image: bool = True

    def __call__(self, attn: Any, hidden: Tensor, context: Tensor, mask: Any, rotary: Any) -> Tensor:
        text, q = context[0, -512:], attn.norm_q(attn.to_q(hidden))[0]
        y = attend(q, attn.norm_k(attn.to_k(text)), attn.to_v(text), attn.heads)
        if self.image:
            picture = context[0, :-512]
            keys = attn.norm_added_k(attn.add_k_proj(picture))
            y = y + attend(q, keys, attn.add_v_proj(picture), attn.heads)
        if self.ip is not None and self.tokens is not None:
            c, k_norm = self.tokens, None
            if "registers" in self.ip:
                c, k_norm = torch.cat([c, tensor(self.ip, "registers")[0]]), attn.norm_k.weight
            keys = rms(dense(self.ip, "to_k_ip", c), k_norm, 1e-5 if k_norm is None else 1e-6)
            y = y + self.scale * attend(q, keys, dense(self.ip, "to_v_ip", c), attn.heads)
        return attn.to_out[0](y)[None]


def forward(
    model: WanAnimateTransformer3DModel,
    latent: Tensor,
    pose: Tensor | None,
    t: float,
    text: Tensor,
    image: Any,
) -> Tensor:
    """The velocity of `latent` [1, 36, slots, h, w], without a face clip."""
    rotary, x = model.rope(latent), model.patch_embedding(latent)
    if pose is not None:
        x[:, :, 1:] += model.pose_patch_embedding(pose)
    slots, h, w = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    temb, proj, text, image = model.condition_embedder(torch.tensor([t]), text, image, timestep_seq_len=None)
    context = text if image is None else torch.cat([image, text], 1)
    for block in model.blocks:
        x = block(x, context, proj.unflatten(1, (6, -1)), rotary)
    shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, 1)
    y = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
    y = y.reshape(1, slots, h, w, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def face_features(model: WanAnimateTransformer3DModel, latent: Tensor, text: Tensor) -> list[Tensor]:
    """By block the input of its self-attention, for the face latent [16, 1, 32, 32]."""
    for block in model.blocks:
        block.attn1.set_processor(SelfAttention())
        block.attn2.set_processor(CrossAttention(image=False))
    forward(model, torch.cat([latent, torch.zeros(20, 1, 32, 32)])[None], None, 0.0, text[None], None)
    return [block.attn1.processor.seen for block in model.blocks]
