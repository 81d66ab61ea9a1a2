"""CLIP features to image tokens of the transformer's width (model_spec.md 1.4, step 9)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear


def network(model: ModelConfig) -> Network:
    dim, image = model.transformer.dim, model.image
    return Network(
        name="image_embed",
        part="transformer",
        inputs=(Tensor("image", (image.tokens, image.dim)),),
        weights=(
            Tensor("img_emb.proj.0.weight", (image.dim,)),
            Tensor("img_emb.proj.0.bias", (image.dim,)),
            *linear("img_emb.proj.1", image.dim, image.dim),
            *linear("img_emb.proj.3", dim, image.dim),
            Tensor("img_emb.proj.4.weight", (dim,)),
            Tensor("img_emb.proj.4.bias", (dim,)),
        ),
        outputs=(Tensor("image_tokens", (image.tokens, dim)),),
    )
