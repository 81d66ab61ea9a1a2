"""Which weights stay on the GPU and which stream: decided from the sizes before anything is uploaded.

Bytes are counted as the GPU keeps them. The blocks of the transformer are what streams, from the last
backwards, since a step uses each once; everything else stays, or comes and goes before the steps begin.
"""

from dataclasses import dataclass

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.errors import MemoryShort
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.streaming import SLOTS

BLOCK = ("attn_in", "attn_out")  # in the order in which a block runs them
BEFORE_THE_STEPS = (
    "text_encoder_layer",
    "image_encoder_embed",
    "image_encoder_layer",
    "text_embed",
    "image_embed",
    "context_kv",
    "time_embed",
)
CONTEXT_BYTES = 700 << 20  # of CUDA and of TensorRT's kernels; measured 0.6 GB on an H200


@dataclass(frozen=True)
class Residency:
    arena: int  # activations
    scratch: int  # of the engines, shared
    resident: int  # weights that stay
    streamed: list[Pack]  # in the order of a step; empty if everything fits
    slots: int  # bytes of the slots they stream through

    @property
    def total(self) -> int:
        return self.arena + self.scratch + self.resident + self.slots + CONTEXT_BYTES


def plan_residency(
    config: ModelConfig, networks: dict[str, Network], arena: int, scratch: int, budget: int
) -> Residency:
    """Keeps as many blocks as fit into `budget` bytes; MemoryShort, with the budget that would do, if that is
    too little for streaming all.
    """
    blocks = [Pack.of(networks[name], n) for n in range(config.transformer.layers) for name in BLOCK]
    others = sum(
        Pack.of(network, n).size
        for network in networks.values()
        if network.name not in BLOCK + BEFORE_THE_STEPS
        for n in range(network.repeats)
    )
    whole = Residency(arena, scratch, others + sum(pack.size for pack in blocks), [], 0)
    if whole.total <= budget:
        return whole
    slots = SLOTS * max(pack.size for pack in blocks)
    for kept in range(len(blocks) - len(BLOCK), -1, -len(BLOCK)):
        resident = others + sum(pack.size for pack in blocks[:kept])
        partial = Residency(arena, scratch, resident, blocks[kept:], slots)
        if partial.total <= budget:
            return partial
    raise MemoryShort(
        f"This job needs {partial.total / 1e9:.1f} GB of GPU memory even if all blocks stream; "
        f"{budget / 1e9:.1f} GB are to be used.",
        f"Use --vram {partial.total / 1e9 + 0.1:.1f}, or a smaller size or window.",
    )
