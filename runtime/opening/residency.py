"""Which weights stay on the GPU and which stream: decided from the sizes before anything is uploaded.

Bytes are counted as the GPU keeps them. Only blocks of the transformer stream, from the last backwards: a
step uses each of them once. Other weights are resident, or are freed before the first step.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.lynx import Lynx, lynx_plans
from trt_wan.engines.shape import Plan
from trt_wan.errors import MemoryShort
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.streaming import SLOTS

BLOCK = ("attn_in", "attn_out", "ffn")  # those with weights, in the order of a block
BEFORE_THE_STEPS = (
    "text_encoder_layer",
    "image_encoder_embed",
    "image_encoder_layer",
    "text_embed",
    "image_embed",
    "context_kv",
    "time_embed",
    "uni3c_modulation",
)
BETWEEN_WINDOWS = ("text_embed", "context_kv")  # needed between windows where prompts change
KERNELS_BYTES = 200 << 20  # loaded after the CUDA context is open
CONTEXT_BYTES = (500 << 20) + KERNELS_BYTES  # context and kernels; measured 0.6 GB on an H200


@dataclass(frozen=True)
class Residency:
    arena: int  # activations
    scratch: int  # shared by the engines
    resident: int  # weights that stay
    streamed: list[Pack]  # in the order of a step; empty if everything fits
    slots: int  # bytes of the slots they stream through
    passing: tuple[str, ...] = BEFORE_THE_STEPS  # networks whose weights are freed before the steps
    spare: int = 0  # for weights that pass while the others are there

    @property
    def total(self) -> int:
        return self.arena + self.scratch + self.resident + self.slots + self.spare


def weight_bytes(networks: Mapping[str, Network]) -> dict[str, int]:
    """Bytes of all weights of each network."""
    return {
        name: sum(Pack.of(network, n).size for n in range(network.repeats))
        for name, network in networks.items()
    }


def passing_bytes(networks: Mapping[str, Network], names: Collection[str] = BEFORE_THE_STEPS) -> int:
    """Bytes of weights on the GPU at a time while these networks pass: a set that runs, one that the GPU may
    still use, and one that is loaded.
    """
    return 3 * max(Pack.of(networks[name], 0).size for name in names if name in networks)


def lynx_bytes(config: ModelConfig, plan: Plan, adapters: Lynx) -> int:
    """Bytes of weights on the GPU at a time while Lynx makes its keys, which all blocks take part in."""
    names = [*(("lynx_ip_kv",) if adapters.ip else ()), *(("lynx_ref_kv",) if adapters.ref else ())]
    made = {name: row for each in lynx_plans(plan, adapters) for name, row in networks(config, each).items()}
    return passing_bytes({**networks(config, plan), **made}, (*BETWEEN_WINDOWS, *names))


def plan_residency(
    config: ModelConfig,
    networks: Mapping[str, Network],
    arena: int,
    scratch: int,
    budget: int,
    keep_encoders: bool = False,
    spare: int = 0,
    tiled: bool = False,
) -> Residency:
    """Keeps as many blocks as fit into `budget` bytes, which do not include the CUDA context.

    With `keep_encoders`, in a model that stays open, the networks of BEFORE_THE_STEPS keep their weights if
    all weights fit; else those pass again in each job, beside the blocks that stay. `spare`: bytes of weights
    that pass between two windows. Raises MemoryShort, with the --vram that would do, if `budget` is too small
    even when all blocks stream. `tiled`: the VAE computes in tiles, which the error says.
    """
    sizes = weight_bytes(networks)
    everything = Residency(arena, scratch, sum(sizes.values()), [], 0, ())
    if keep_encoders and everything.total <= budget:
        return everything
    blocks = [Pack.of(networks[name], n) for n in range(config.transformer.layers) for name in BLOCK]
    if keep_encoders:
        spare = max(spare, passing_bytes(networks))
    others = sum(size for name, size in sizes.items() if name not in (*BLOCK, *BEFORE_THE_STEPS))
    whole = Residency(arena, scratch, others + sum(pack.size for pack in blocks), [], 0, spare=spare)
    if whole.total <= budget:
        return whole
    slots = SLOTS * max(pack.size for pack in blocks)
    for kept in range(len(blocks) - len(BLOCK), -1, -len(BLOCK)):
        resident = others + sum(pack.size for pack in blocks[:kept])
        partial = Residency(arena, scratch, resident, blocks[kept:], slots, spare=spare)
        if partial.total <= budget:
            return partial
    needed = (partial.total + CONTEXT_BYTES) / 1e9
    tiles = " and the VAE computes in tiles" if tiled else ""
    raise MemoryShort(
        f"This job needs {needed:.1f} GB of GPU memory even if all blocks stream{tiles}; "
        f"{(budget + CONTEXT_BYTES) / 1e9:.1f} GB are to be used.",
        f"Use --vram {needed + 0.1:.1f}, or a smaller size or window.",
    )
