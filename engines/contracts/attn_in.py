"""The start of a block: norm, modulation, q/k/v, their RMS norm, RoPE (model_spec.md 1.4, 1.5)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c = model.transformer
    tokens = plan.tokens
    heads = (c.heads, tokens, c.head_dim)
    return Network(
        name="attn_in",
        part="transformer",
        scope="blocks.{n}.",
        repeats=c.layers,
        quantised=True,
        inputs=(
            Tensor("x", (tokens, c.dim)),
            Tensor("time_modulation", (6, c.dim)),
            Tensor("rope_cos", (tokens, c.head_dim // 2)),
            Tensor("rope_sin", (tokens, c.head_dim // 2)),
        ),
        weights=(
            Tensor("modulation", (1, 6, c.dim)),
            *linear("self_attn.q", c.dim, c.dim),
            *linear("self_attn.k", c.dim, c.dim),
            *linear("self_attn.v", c.dim, c.dim),
            Tensor("self_attn.norm_q.weight", (c.dim,)),
            Tensor("self_attn.norm_k.weight", (c.dim,)),
        ),
        outputs=(
            Tensor("q", heads, "activation"),
            Tensor("k", heads, "activation"),
            Tensor("v", heads, "activation"),
        ),
    )
