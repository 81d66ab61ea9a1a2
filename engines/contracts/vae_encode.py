"""Frames in [-1, 1] to normalised latents by chunks: one frame, then `4·vae_chunk` (model_spec.md 7)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.contracts import vae_layers
from trt_wan.engines.shape import Plan


def _network(name: str, model: ModelConfig, plan: Plan, frames: int, latents: int, first: bool) -> Network:
    latent = (model.vae.latent_channels, latents, plan.latent_height, plan.latent_width)
    return vae_layers.network(
        name,
        vae_layers.encoder(model.vae),
        plan,
        chunk=Tensor("frames", (3, frames, plan.height, plan.width)),
        result=Tensor("latent", latent),
        first=first,
    )


def first(model: ModelConfig, plan: Plan) -> Network:
    return _network("vae_encode_first", model, plan, 1, 1, first=True)


def next_chunk(model: ModelConfig, plan: Plan) -> Network:
    return _network("vae_encode_next", model, plan, 4 * plan.vae_chunk, plan.vae_chunk, first=False)
