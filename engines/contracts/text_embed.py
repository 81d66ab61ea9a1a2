"""umT5 features to text tokens of the transformer's width (model_spec.md 1.4, step 9)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear


def network(model: ModelConfig) -> Network:
    dim, text = model.transformer.dim, model.text
    return Network(
        name="text_embed",
        part="transformer",
        inputs=(Tensor("text", (text.length, text.dim)),),
        weights=(*linear("text_embedding.0", dim, text.dim), *linear("text_embedding.2", dim, dim)),
        outputs=(Tensor("text_tokens", (text.length, dim)),),
    )
