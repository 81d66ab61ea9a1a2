"""Adds the face after every fifth block: each slot attends to its five face tokens (model_spec.md 1.8)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear
from trt_wan.engines.contracts import fuser_kv
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    c = model.transformer
    return Network(
        name="fuser",
        part="transformer",
        scope="face_adapter.fuser_blocks.{n}.",
        repeats=c.fusers,
        inputs=(
            Tensor("x", (plan.tokens, c.dim)),
            *fuser_kv.network(model, plan).outputs,
            Tensor("face_strength", (1,)),
        ),
        weights=(
            *linear("linear1_q", c.dim, c.dim),
            Tensor("q_norm.weight", (c.head_dim,)),
            *linear("linear2", c.dim, c.dim),
        ),
        outputs=(Tensor("x_out", (plan.tokens, c.dim)),),
    )
