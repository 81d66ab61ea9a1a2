"""Names of tensors: how the checkpoints that people have spell the canonical ones (engines/checkpoint.py)."""

import re

from trt_wan.engines.checkpoint import DIRECTION
from trt_wan.engines.contract import Part

PREFIXES = ("model.diffusion_model.", "diffusion_model.")

# The official umT5 names, as in Kijai's files, to the Hugging Face names, as in Comfy's (model_spec.md 5.4).
TEXT_RENAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.weight$", "encoder.final_layer_norm.weight"),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)

# A part's file has one of these, as stored; no other kind of file has any.
SIGNATURES: dict[Part, tuple[str, ...]] = {
    "transformer": tuple(prefix + DIRECTION for prefix in ("", *PREFIXES)),
    "vae": ("decoder.upsamples.0.residual.2.weight",),
    "text_encoder": (  # umT5 has a position bias in every block, the T5 of other models in block 0 only
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "blocks.1.pos_embedding.embedding.weight",
    ),
    "image_encoder": ("vision_model.embeddings.class_embedding",),
}


def canonical(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if name.startswith(("blocks.", "token_embedding.", "norm.")):
        for pattern, replacement in TEXT_RENAMES:
            name = re.sub(pattern, replacement, name)
    return name
