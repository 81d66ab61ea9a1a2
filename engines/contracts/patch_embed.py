"""Latents, condition and pose to tokens: the transformer's entry (model_spec.md 1.4, steps 1-3 and 7)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c = model.transformer
    h, w = plan.latent_height, plan.latent_width
    return Network(
        name="patch_embed",
        part="transformer",
        inputs=(
            Tensor("latent", (c.latent_channels, plan.slots, h, w)),
            Tensor("condition", (c.condition_channels, plan.slots, h, w)),
            Tensor("pose_latent", (c.latent_channels, plan.latent_frames, h, w)),
            Tensor("pose_strength", (1,)),  # 0 adds nothing, as without a pose clip
        ),
        weights=(
            Tensor("patch_embedding.weight", (c.dim, c.latent_channels + c.condition_channels, 1, 2, 2)),
            Tensor("patch_embedding.bias", (c.dim,)),
            Tensor("pose_patch_embedding.weight", (c.dim, c.latent_channels, 1, 2, 2)),
            Tensor("pose_patch_embedding.bias", (c.dim,)),
        ),
        outputs=(Tensor("x", (plan.tokens, c.dim)),),
    )
