"""Block-sparse self-attention, of the tier `turbo`. Each head attends, from each block of QUERIES queries, to
`keep` of the blocks of BLOCK keys: those with the highest products of means, of q and k. The blocks of slot 0
(the reference), those that share tokens with the block of queries and the last are always among them. A
skipped block counts as BLOCK keys that are equal to its mean key, with its mean value.

A block is a compact part of the video, whose tokens are most alike: 8x8 tokens of two slots for keys, 8x12 of
two slots for queries. See `block_order`.
"""

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.contracts import attention
from trt_wan.engines.shape import Plan

BLOCK = 128  # tokens of a block of keys
QUERIES = 192  # tokens of a block of queries
STRIP = 8  # rows


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


def block_order(plan: Plan) -> NDArray[np.int32]:
    """The numbers of the tokens as the blocks take them: slot 0, then two slots at a time, in strips of STRIP
    rows, column after column. Sides that are no multiple of 8 tokens have blocks of other shapes.
    """
    shape = plan.slots, plan.height // 16, plan.width // 16
    slot, row, column = (axis.reshape(-1) for axis in np.indices(shape))
    return np.lexsort((slot, row, column, row // STRIP, (slot + 1) // 2)).astype(np.int32)
