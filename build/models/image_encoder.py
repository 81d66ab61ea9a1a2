"""The CLIP vision tower: patches, class token and positions, then one pre-norm layer (model_spec.md 8.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import (
    Weights,
    attend,
    layer_norm,
    linear,
    merge_heads,
    operand,
    project,
    split_heads,
)
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan


def _norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return layer_norm(x, eps, w[f"{name}.weight"], w[f"{name}.bias"])


def embed(pixels: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor]:
    i = model.image
    grid = i.size // i.patch
    patches = pixels.reshape(3, grid, i.patch, grid, i.patch).permute(1, 3, 0, 2, 4).reshape(grid * grid, -1)
    tokens = F.linear(patches, w["embeddings.patch_embedding.weight"].flatten(1))
    tokens = torch.cat((w["embeddings.class_embedding"][None], tokens))
    return (_norm(tokens + w["embeddings.position_embedding.weight"], w, "pre_layrnorm", i.eps),)


def layer(hidden: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor]:
    i = model.image
    h = operand(_norm(hidden, w, "layer_norm1", i.eps), w["self_attn.q_proj.weight"])
    q, k, v = (split_heads(project(h, w, f"self_attn.{name}_proj"), i.heads) for name in "qkv")
    attended = merge_heads(attend(q * (i.dim // i.heads) ** -0.5, k, v))
    hidden = hidden + linear(attended, w, "self_attn.out_proj")

    up = F.gelu(linear(_norm(hidden, w, "layer_norm2", i.eps), w, "mlp.fc1").float())
    return (hidden + linear(up, w, "mlp.fc2"),)
