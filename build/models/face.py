"""The face path: crops to motion vectors, these to face tokens, and the fusers (model_spec.md 1.6-1.8)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import Weights, activation, attend, layer_norm, linear, rms_norm
from trt_wan.engines.config import FACE_TOKENS, ModelConfig
from trt_wan.engines.shape import Plan

FACE_NORM_EPS = 1e-6


def _equalized(w: Weights, name: str) -> Tensor:
    """A weight of the motion encoder, divided by the root of its fan-in."""
    weight = w[f"{name}.weight"]
    return weight * (1 / math.sqrt(weight[0].numel()))


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def _blur(x: Tensor, pad: int) -> Tensor:
    """Depthwise 4x4 binomial filter, zero padding on every side."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    kernel = torch.outer(row, row).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, padding=pad, groups=x.shape[1])


def _residual_block(x: Tensor, w: Weights, name: str) -> Tensor:
    h = _leaky(F.conv2d(x, _equalized(w, f"{name}.conv1.0"), padding=1) + w[f"{name}.conv1.1.bias"])
    h = F.conv2d(_blur(h, 2), _equalized(w, f"{name}.conv2.1"), stride=2)
    h = _leaky(h + w[f"{name}.conv2.2.bias"])
    skip = F.conv2d(_blur(x, 1), _equalized(w, f"{name}.skip.1"), stride=2)
    return (h + skip) * (1 / math.sqrt(2))


def motion_encoder(face: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor]:
    convs = "enc.net_app.convs"
    last = len(model.motion.channels)
    x = _leaky(F.conv2d(face, _equalized(w, f"{convs}.0.0")) + w[f"{convs}.0.1.bias"])
    for i in range(1, last):
        x = _residual_block(x, w, f"{convs}.{i}")
    x = F.conv2d(x, _equalized(w, f"{convs}.{last}")).flatten(1)
    for i in range(5):
        x = F.linear(x, _equalized(w, f"enc.fc.{i}"), w[f"enc.fc.{i}.bias"])
    return (F.linear(x, w["dec.direction.orthonormal"]),)


def face_encoder(motion: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor]:
    heads = model.face.heads

    def causal_conv(x: Tensor, name: str, stride: int) -> Tensor:
        """[n, frames, channels]; two copies of the first frame stand before it."""
        x = torch.cat((x[:, :1], x[:, :1], x), dim=1).transpose(1, 2)
        return F.conv1d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride).transpose(1, 2)

    def norm_silu(x: Tensor) -> Tensor:
        return F.silu(layer_norm(x, FACE_NORM_EPS))

    x = causal_conv(motion[None], "conv1_local", 1)[0]
    x = x.reshape(plan.frames, heads, -1).transpose(0, 1)  # the heads become the batch
    x = causal_conv(norm_silu(x), "conv2", 2)
    x = causal_conv(norm_silu(x), "conv3", 2)
    x = linear(norm_silu(x), w, "out_proj").transpose(0, 1)  # [T, heads, dim]
    padding = w["padding_tokens"][0].expand(x.shape[0], -1, -1)
    tokens = torch.cat((x, padding), dim=1)
    return (torch.cat((torch.zeros_like(tokens[:1]), tokens)),)


def fuser_kv(face_tokens: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor, Tensor]:
    c = model.transformer
    kv = linear(layer_norm(face_tokens, c.eps), w, "linear1_kv")
    k, v = kv.reshape(plan.slots, FACE_TOKENS, 2, c.heads, c.head_dim).permute(2, 0, 3, 1, 4)
    return rms_norm(k, w["k_norm.weight"], c.eps).to(activation(plan)), v.to(activation(plan))


def fuser(
    x: Tensor,
    face_k: Tensor,
    face_v: Tensor,
    face_strength: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor]:
    c = model.transformer
    q = linear(layer_norm(x, c.eps), w, "linear1_q").reshape(plan.slots, -1, c.heads, c.head_dim)
    q = rms_norm(q, w["q_norm.weight"] * c.head_dim**-0.5, c.eps).transpose(1, 2)
    face = attend(q.to(activation(plan)), face_k, face_v).transpose(1, 2).reshape(plan.tokens, c.dim)
    return (x + linear(face, w, "linear2") * face_strength,)
