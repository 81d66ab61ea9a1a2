"""Tokens to velocity: modulated norm, projection, unpatchify (model_spec.md 1.4, steps 11-12)."""

from torch import Tensor

from trt_wan.build.models.ops import Weights, linear, modulated
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan


def head(x: Tensor, time_embedding: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor]:
    c = model.transformer
    shift, scale = w["modulation"][0] + time_embedding
    patches = linear(modulated(x, c.eps, shift, scale), w, "head")
    h, width = plan.latent_height, plan.latent_width
    patches = patches.reshape(plan.slots, h // 2, width // 2, 2, 2, c.latent_channels)
    return (patches.permute(5, 0, 1, 3, 2, 4).reshape(c.latent_channels, plan.slots, h, width),)
