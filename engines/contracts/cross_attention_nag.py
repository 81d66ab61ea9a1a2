"""`cross_attention` with normalised attention guidance: the attention to the text is moved away from that to
a negative text (addons_spec.md 3). No weights. Only jobs with NAG run it.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.contracts import context_kv, cross_attention
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    plain = cross_attention.network(model, plan)
    text_k, text_v = context_kv.network(model).outputs[:2]
    return Network(
        name="cross_attention_nag",
        part="transformer",
        inputs=(
            *plain.inputs,
            Tensor("nag_k", text_k.shape, "activation"),
            Tensor("nag_v", text_v.shape, "activation"),
            Tensor("nag_scale", (1,)),
            Tensor("nag_tau", (1,)),
            Tensor("nag_alpha", (1,)),
        ),
        weights=(),
        outputs=plain.outputs,
        optional=True,
    )
