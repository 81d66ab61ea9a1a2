"""Independent implementations with our weights: diffusers' modules loaded from official names, strictly, in fp32."""

from collections.abc import Mapping

import torch
from diffusers import WanAnimateTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from trt_wan.engines.config import ModelConfig
from trt_wan.runtime.executors import Array


def state_dict(weights: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(weights[name].copy()) for name in weights}


def diffusers_transformer(
    model: ModelConfig, weights: Mapping[str, Array]
) -> WanAnimateTransformer3DModel:
    c, m = model.transformer, model.motion
    transformer = WanAnimateTransformer3DModel(
        num_attention_heads=c.heads,
        attention_head_dim=c.head_dim,
        in_channels=c.latent_channels + c.condition_channels,
        latent_channels=c.latent_channels,
        out_channels=c.latent_channels,
        text_dim=model.text.dim,
        freq_dim=c.frequency_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.layers,
        image_dim=model.image.dim,
        added_kv_proj_dim=c.dim,
        motion_encoder_size=m.size,
        motion_encoder_channel_sizes={str(m.size >> i): n for i, n in enumerate(m.channels)},
        motion_style_dim=m.style_dim,
        motion_dim=m.motion_dim,
        motion_encoder_dim=m.style_dim,
        face_encoder_hidden_dim=model.face.hidden_dim,
        face_encoder_num_heads=model.face.heads,
        inject_face_latents_blocks=c.fuser_interval,
    )
    # diffusers' converter numbers the motion convolutions of the full-size model; TINY has as many.
    converted = convert_wan_transformer_to_diffusers(state_dict(weights))
    transformer.load_state_dict(converted, strict=True)
    return transformer.eval().requires_grad_(False)
