"""Our model configurations as arguments of diffusers' WanAnimateTransformer3DModel."""

from typing import Any

from trt_wan.engines.config import ModelConfig


def diffusers_arguments(model: ModelConfig) -> dict[str, Any]:
    """Returns the arguments of the class."""
    c, m = model.transformer, model.motion
    return {
        "num_attention_heads": c.heads,
        "attention_head_dim": c.head_dim,
        "in_channels": c.latent_channels + c.condition_channels,
        "latent_channels": c.latent_channels,
        "out_channels": c.latent_channels,
        "text_dim": model.text.dim,
        "freq_dim": c.frequency_dim,
        "ffn_dim": c.ffn_dim,
        "num_layers": c.layers,
        "image_dim": model.image.dim,
        "added_kv_proj_dim": c.dim,
        "motion_encoder_size": m.size,
        "motion_encoder_channel_sizes": {str(m.size >> i): n for i, n in enumerate(m.channels)},
        "motion_style_dim": m.style_dim,
        "motion_dim": m.motion_dim,
        "motion_encoder_dim": m.style_dim,
        "face_encoder_hidden_dim": model.face.hidden_dim,
        "face_encoder_num_heads": model.face.heads,
        "inject_face_latents_blocks": c.fuser_interval,
    }
