"""From candidates to segments: which of them can be used here, and the opening of those that were chosen.

Engines that are missing or damaged are built on the spot. Libraries and our kernels are imported only when
they are asked about.
"""

from collections.abc import Mapping

from trt_wan.engines.choice.candidates import SPARSE, Candidate, Engine, Machine
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.contracts.sparse_attention import block_order
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import Capability, GpuKind
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import Recipe
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import Progress
from trt_wan.runtime.segments.segment import Segment
from trt_wan.runtime.segments.tensorrt import open_engines


def machine_of(gpu: Gpu, flavour: Flavour) -> Machine:
    return Machine(GpuKind(gpu.name, gpu.driver), gpu.capability, flavour)


def missing(candidate: Candidate, capability: Capability) -> str | None:
    """Why the candidate cannot be used on GPUs of that capability, in a sentence; None if it can."""
    if candidate.maker == "native":
        from trt_wan.runtime.segments import native

        return native.missing(candidate.network, capability, candidate.name)
    if candidate.maker == "attention":
        from trt_wan.runtime.segments import attention

        return attention.missing(candidate.name, capability)
    return None


def of_attention(candidate: Candidate) -> tuple[bool, int]:
    """Whether it also computes `to_rows` (contracts/attention.py), and the queries of its tiles."""
    from trt_wan.runtime.segments.attention import PROVIDERS

    provider = PROVIDERS[candidate.name]
    return provider.to_rows, provider.queries


def open_segments(
    chosen: Mapping[str, Candidate],
    config: ModelConfig,
    plan: Plan,
    gpu: Gpu,
    recipes: Mapping[Engine, Recipe],
    progress: Progress,
    contracts: Mapping[str, Network] | None = None,
) -> dict[str, Segment]:
    """By network, of `contracts` if given, else of the plan. All engines are opened in one call: new ones
    have their kernels finished side by side.
    """
    contracts = networks(config, plan) if contracts is None else contracts
    engines = {name: recipes[row.engine] for name, row in chosen.items() if row.engine is not None}
    segments: dict[str, Segment] = {**open_engines(gpu, engines, progress)}
    for name, candidate in chosen.items():
        if candidate.maker == "native":
            from trt_wan.runtime.segments.native import open_native

            segments[name] = open_native(contracts[name], config, plan, gpu, candidate.name)
        elif candidate.maker == "attention":
            from trt_wan.runtime.segments.attention import open_attention

            shape = contracts[name].inputs[0].shape  # q comes first
            blocks = (block_order(plan), plan.undivided.tokens_per_slot) if candidate == SPARSE else ()
            segments[name] = open_attention(candidate.name, gpu, *shape, *blocks)
    return segments
