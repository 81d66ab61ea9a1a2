"""The rest of a block: output projection of cross-attention, then the FFN (model_spec.md 1.4)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c = model.transformer
    tokens = (plan.tokens, c.dim)
    return Network(
        name="ffn",
        part="transformer",
        scope="blocks.{n}.",
        repeats=c.layers,
        quantised=True,
        inputs=(
            Tensor("x", tokens),
            Tensor("cross_attended", tokens, "activation"),
            Tensor("time_modulation", (6, c.dim)),
        ),
        weights=(
            Tensor("modulation", (1, 6, c.dim)),
            *linear("cross_attn.o", c.dim, c.dim),
            *linear("ffn.0", c.ffn_dim, c.dim),
            *linear("ffn.2", c.dim, c.ffn_dim),
        ),
        outputs=(Tensor("x_out", tokens),),
    )
