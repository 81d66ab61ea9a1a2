"""Block-sparse self-attention, of the tier `turbo`. Each head attends, from each block of BLOCK queries, to
`keep` of the blocks of keys: those with the highest products of means, of q and k. The blocks of slot 0 (the
reference), the block's own and the last are always among them. A skipped block counts as BLOCK keys that are
equal to its mean key, with its mean value.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.contracts import attention
from trt_wan.engines.shape import Plan

BLOCK = 128  # tokens


def network(model: ModelConfig, plan: Plan) -> Network:
    dense = attention.network(model, plan)
    return Network(
        name="sparse_attention",
        part="transformer",
        inputs=(*dense.inputs, Tensor("keep", (1,))),
        weights=(),
        outputs=dense.outputs,
        optional=True,
    )
