"""Self-attention over all tokens. It is a separate network so that other kernels can compute it."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c, tokens = model.transformer, plan.undivided.tokens
    count = plan.attended_heads(c.heads)
    heads = (count, tokens, c.head_dim)
    return Network(
        name="attention",
        part="transformer",
        inputs=(
            Tensor("q", heads, "activation"),
            Tensor("k", heads, "activation"),
            Tensor("v", heads, "activation"),
        ),
        weights=(),
        outputs=(Tensor("attended", (tokens, count * c.head_dim), "activation"),),
    )
