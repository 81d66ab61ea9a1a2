"""Keys and values of the face tokens for one fuser, computed once per window (model_spec.md 1.8)."""

from trt_wan.engines.config import FACE_TOKENS, ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c = model.transformer
    heads = (plan.slots, c.heads, FACE_TOKENS, c.head_dim)
    return Network(
        name="fuser_kv",
        part="transformer",
        scope="face_adapter.fuser_blocks.{n}.",
        repeats=c.fusers,
        inputs=(Tensor("face_tokens", (plan.slots, FACE_TOKENS, c.dim)),),
        weights=(*linear("linear1_kv", 2 * c.dim, c.dim), Tensor("k_norm.weight", (c.head_dim,))),
        outputs=(Tensor("face_k", heads, "activation"), Tensor("face_v", heads, "activation")),
    )
