"""Keys and values of the text and image tokens for one block, computed once per job."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear


def network(model: ModelConfig) -> Network:
    c = model.transformer
    text = (c.heads, model.text.length, c.head_dim)
    image = (c.heads, model.image.tokens, c.head_dim)
    return Network(
        name="context_kv",
        part="transformer",
        scope="blocks.{n}.cross_attn.",
        repeats=c.layers,
        quantised=True,
        inputs=(
            Tensor("text_tokens", (model.text.length, c.dim)),
            Tensor("image_tokens", (model.image.tokens, c.dim)),
        ),
        weights=(
            *linear("k", c.dim, c.dim),
            *linear("v", c.dim, c.dim),
            Tensor("norm_k.weight", (c.dim,)),
            *linear("k_img", c.dim, c.dim),
            *linear("v_img", c.dim, c.dim),
            Tensor("norm_k_img.weight", (c.dim,)),
        ),
        outputs=(
            Tensor("text_k", text, "activation"),
            Tensor("text_v", text, "activation"),
            Tensor("image_k", image, "activation"),
            Tensor("image_v", image, "activation"),
        ),
    )
