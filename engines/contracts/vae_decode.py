"""Normalised latents to unclamped frames by chunks: one latent frame, then `vae_chunk` (model_spec.md 7)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.contracts import vae_layers
from trt_wan.engines.shape import Plan


def _network(name: str, model: ModelConfig, plan: Plan, latents: int, frames: int, first: bool) -> Network:
    latent = (model.vae.latent_channels, latents, plan.latent_height, plan.latent_width)
    return vae_layers.network(
        name,
        vae_layers.decoder(model.vae),
        plan,
        chunk=Tensor("latent", latent),
        result=Tensor("frames", (3, frames, plan.height, plan.width)),
        first=first,
    )


def first(model: ModelConfig, plan: Plan) -> Network:
    return _network("vae_decode_first", model, plan, 1, 1, first=True)


def next_chunk(model: ModelConfig, plan: Plan) -> Network:
    return _network("vae_decode_next", model, plan, plan.vae_chunk, 4 * plan.vae_chunk, first=False)
