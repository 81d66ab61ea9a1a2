"""The inputs of the transformer: latents with condition and pose, time, text, image (model_spec.md 1.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_wan.build.models.ops import Weights, gelu_tanh, layer_norm, linear
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan

IMAGE_NORM_EPS = 1e-5  # img_emb alone has it; all other norms of the transformer have 1e-6


def _patchify(x: Tensor) -> Tensor:
    """[c, t, h, w] to [t·(h/2)·(w/2), c·2·2]: one row for each place of a (1,2,2) kernel of that stride."""
    c, t, h, w = x.shape
    return (
        x.reshape(c, t, h // 2, 2, w // 2, 2)
        .permute(1, 2, 4, 0, 3, 5)
        .reshape(t * (h // 2) * (w // 2), c * 4)
    )


def patch_linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(_patchify(x), w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])


def patch_embed(
    latent: Tensor,
    condition: Tensor,
    pose_latent: Tensor,
    pose_strength: Tensor,
    *,
    w: Weights,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Tensor]:
    x = patch_linear(torch.cat((latent, condition)), w, "patch_embedding")
    pose = patch_linear(pose_latent, w, "pose_patch_embedding") * pose_strength
    reference = plan.tokens_per_slot  # the reference slot gets no pose
    return (torch.cat((x[:reference], x[reference:] + pose)),)


def time_embed(sinusoid: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor, Tensor]:
    time_embedding = linear(sinusoid, w, "time_embedding.0")
    time_embedding = linear(F.silu(time_embedding), w, "time_embedding.2")
    modulation = linear(F.silu(time_embedding), w, "time_projection.1")
    return time_embedding, modulation.reshape(6, model.transformer.dim)


def text_embed(text: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor]:
    hidden = gelu_tanh(linear(text, w, "text_embedding.0").float())
    return (linear(hidden, w, "text_embedding.2").float(),)


def image_embed(image: Tensor, *, w: Weights, model: ModelConfig, plan: Plan) -> tuple[Tensor]:
    x = layer_norm(image, IMAGE_NORM_EPS, w["img_emb.proj.0.weight"], w["img_emb.proj.0.bias"])
    x = linear(F.gelu(linear(x, w, "img_emb.proj.1").float()), w, "img_emb.proj.3")
    return (layer_norm(x.float(), IMAGE_NORM_EPS, w["img_emb.proj.4.weight"], w["img_emb.proj.4.bias"]),)
