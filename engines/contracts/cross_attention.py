"""Attention of all tokens to the text plus attention to the image, without weights (model_spec.md 1.4)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.contracts import context_kv
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    tokens = (plan.tokens, model.transformer.dim)
    return Network(
        name="cross_attention",
        part="transformer",
        inputs=(Tensor("cross_q", tokens, "activation"), *context_kv.network(model).outputs),
        weights=(),
        outputs=(Tensor("cross_attended", tokens, "activation"),),
    )
