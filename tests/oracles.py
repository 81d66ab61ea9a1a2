"""Independent implementations with our weights, loaded strictly, in fp32."""

import hashlib
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

from trt_wan.benchmarks.peers.diffusers_arguments import diffusers_arguments
from trt_wan.engines.config import ImageConfig, ModelConfig, TextConfig
from trt_wan.runtime.executors import Array


def state_dict(weights: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(weights[name].copy()) for name in weights}


def diffusers_transformer(model: ModelConfig, weights: Mapping[str, Array]) -> WanAnimateTransformer3DModel:
    transformer = WanAnimateTransformer3DModel(**diffusers_arguments(model))
    # diffusers' converter numbers the motion convolutions of the full-size model; TINY has as many.
    converted = convert_wan_transformer_to_diffusers(state_dict(weights))
    transformer.load_state_dict(converted, strict=True)
    _remember(transformer.motion_encoder)
    return transformer.eval().requires_grad_(False)


def _remember(module: torch.nn.Module) -> None:
    """Keeps a module's results: diffusers encodes the same faces in every step, five seconds each time."""
    forward, results = module.forward, {}

    def remembering(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        key = hashlib.sha256(x.numpy().tobytes()).digest()
        if key not in results:
            results[key] = forward(x, *args, **kwargs)
        return results[key]

    module.forward = remembering


def diffusers_vae(model: ModelConfig, weights: Mapping[str, Array]) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(base_dim=model.vae.base_dim)
    vae.load_state_dict(convert_wan_vae_to_diffusers(state_dict(weights)), strict=True)
    return vae.eval().requires_grad_(False)


def umt5_config(t: TextConfig) -> UMT5Config:
    return UMT5Config(
        vocab_size=t.vocabulary,
        d_model=t.dim,
        d_kv=t.head_dim,
        d_ff=t.ffn_dim,
        num_layers=t.layers,
        num_heads=t.heads,
        relative_attention_num_buckets=t.buckets,
        relative_attention_max_distance=t.max_distance,
        layer_norm_epsilon=t.eps,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        attn_implementation="eager",
    )


def transformers_text_encoder(model: ModelConfig, weights: Mapping[str, Array]) -> UMT5EncoderModel:
    encoder = UMT5EncoderModel(umt5_config(model.text))
    named = state_dict(weights)
    named["encoder.embed_tokens.weight"] = named["shared.weight"]  # the same tensor under its second name
    encoder.load_state_dict(named, strict=True)
    return encoder.eval().requires_grad_(False)


def clip_config(i: ImageConfig) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=i.dim,
        intermediate_size=i.ffn_dim,
        num_hidden_layers=i.layers,
        num_attention_heads=i.heads,
        image_size=i.size,
        patch_size=i.patch,
        layer_norm_eps=i.eps,
        hidden_act="gelu",
        projection_dim=1024,
        attn_implementation="eager",
    )


def transformers_image_encoder(
    model: ModelConfig, weights: Mapping[str, Array]
) -> CLIPVisionModelWithProjection:
    i = model.image
    encoder = CLIPVisionModelWithProjection(clip_config(i))
    loaded = encoder.load_state_dict(state_dict(weights), strict=False)
    unused = (
        f"vision_model.encoder.layers.{i.layers_used}.",
        "vision_model.post_layernorm.",
        "visual_projection.",
    )
    assert all(name.startswith(unused) for name in loaded.missing_keys) and not loaded.unexpected_keys, loaded
    return encoder.eval().requires_grad_(False)
