"""Rest of a block after self-attention: output projection, cross-attention, FFN (model_spec.md 1.4)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear
from trt_wan.engines.contracts import context_kv
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c = model.transformer
    return Network(
        name="attn_out",
        part="transformer",
        scope="blocks.{n}.",
        repeats=c.layers,
        fp8=True,
        inputs=(
            Tensor("x", (plan.tokens, c.dim)),
            Tensor("attended", (plan.tokens, c.dim), "activation"),
            Tensor("time_modulation", (6, c.dim)),
            *context_kv.network(model).outputs,
        ),
        weights=(
            Tensor("modulation", (1, 6, c.dim)),
            *linear("self_attn.o", c.dim, c.dim),
            Tensor("norm3.weight", (c.dim,)),
            Tensor("norm3.bias", (c.dim,)),
            *linear("cross_attn.q", c.dim, c.dim),
            Tensor("cross_attn.norm_q.weight", (c.dim,)),
            *linear("cross_attn.o", c.dim, c.dim),
            *linear("ffn.0", c.ffn_dim, c.dim),
            *linear("ffn.2", c.dim, c.ffn_dim),
        ),
        outputs=(Tensor("x_out", (plan.tokens, c.dim)),),
    )
