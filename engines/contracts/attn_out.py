"""From the attended values to the residual stream and the queries of cross-attention (model_spec.md 1.4).

`x_out` is the residual stream after self-attention. `cross_q` holds the normed queries, multiplied by the
softmax scale. They are [tokens, channels] because our kernels and TensorRT write that without another pass.
Several cross-attentions may read them: their results are combined before `ffn`.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c = model.transformer
    tokens = (plan.tokens, c.dim)
    return Network(
        name="attn_out",
        part="transformer",
        scope="blocks.{n}.",
        repeats=c.layers,
        quantised=True,
        inputs=(
            Tensor("x", tokens),
            Tensor("attended", tokens, "activation"),
            Tensor("time_modulation", (6, c.dim)),
        ),
        weights=(
            Tensor("modulation", (1, 6, c.dim)),
            *linear("self_attn.o", c.dim, c.dim),
            Tensor("norm3.weight", (c.dim,)),
            Tensor("norm3.bias", (c.dim,)),
            *linear("cross_attn.q", c.dim, c.dim),
            Tensor("cross_attn.norm_q.weight", (c.dim,)),
        ),
        outputs=(Tensor("x_out", tokens), Tensor("cross_q", tokens, "activation")),
    )
