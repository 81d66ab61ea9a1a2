"""The CLIP vision tower up to the layer used: embedding, and one layer run 31 times (model_spec.md 8.2)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear


def _norm(name: str, dim: int) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (dim,)), Tensor(f"{name}.bias", (dim,))


def embed(model: ModelConfig) -> Network:
    i = model.image
    return Network(
        name="image_encoder_embed",
        part="image_encoder",
        scope="vision_model.",
        inputs=(Tensor("pixels", (3, i.size, i.size)),),
        weights=(
            Tensor("embeddings.class_embedding", (i.dim,)),
            Tensor("embeddings.patch_embedding.weight", (i.dim, 3, i.patch, i.patch)),
            Tensor("embeddings.position_embedding.weight", (i.tokens, i.dim)),
            *_norm("pre_layrnorm", i.dim),
        ),
        outputs=(Tensor("hidden", (i.tokens, i.dim)),),
    )


def layer(model: ModelConfig) -> Network:
    i = model.image
    return Network(
        name="image_encoder_layer",
        part="image_encoder",
        scope="vision_model.encoder.layers.{n}.",
        repeats=i.layers_used,
        inputs=(Tensor("hidden", (i.tokens, i.dim)),),
        weights=(
            *_norm("layer_norm1", i.dim),
            *linear("self_attn.q_proj", i.dim, i.dim),
            *linear("self_attn.k_proj", i.dim, i.dim),
            *linear("self_attn.v_proj", i.dim, i.dim),
            *linear("self_attn.out_proj", i.dim, i.dim),
            *_norm("layer_norm2", i.dim),
            *linear("mlp.fc1", i.ffn_dim, i.dim),
            *linear("mlp.fc2", i.dim, i.ffn_dim),
        ),
        outputs=(Tensor("hidden_out", (i.tokens, i.dim)),),
    )
