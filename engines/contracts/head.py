"""Tokens to the flow velocity, noise - x0, in latent layout (model_spec.md 1.4, steps 11-12)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, exact_linear
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c = model.transformer
    return Network(
        name="head",
        part="transformer",
        scope="head.",
        inputs=(Tensor("x", (plan.tokens, c.dim)), Tensor("time_embedding", (1, c.dim))),
        weights=(
            Tensor("modulation", (1, 2, c.dim)),
            *exact_linear("head", 4 * c.latent_channels, c.dim),
        ),
        outputs=(Tensor("velocity", (c.latent_channels, plan.slots, plan.latent_height, plan.latent_width)),),
    )
