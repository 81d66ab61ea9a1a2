"""Networks of the transformer computed by native kernels around matrix products of cuBLASLt."""

from collections.abc import Callable

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.gpu import HOPPER
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.segment import Segment

FP8_CAPABILITY = (8, 9)


def missing(capability: tuple[int, int]) -> str | None:
    """Why it cannot be used here, in a sentence. None if it can."""
    from trt_wan.runtime.segments.native.gemm import missing as missing_library

    if capability < FP8_CAPABILITY:
        return f"A GPU of compute capability {capability[0]}.{capability[1]} has no FP8."
    return missing_library()


def open_native(network: Network, model: ModelConfig, plan: Plan, gpu: Gpu, name: str = "native") -> Segment:
    """The segment of a network's candidate `name`: a part of a block in FP8, or a fuser."""
    from trt_wan.runtime.segments.native.block import PARTS, CrossAttention
    from trt_wan.runtime.segments.native.cross_attention import HopperCrossAttention
    from trt_wan.runtime.segments.native.fuser import Fp8Fuser, Fuser

    rows: dict[tuple[str, str], Callable[[ModelConfig, Plan, Gpu], Segment]] = {
        **{(part, "native"): opened for part, opened in PARTS.items()},
        ("cross_attention", "native"): HopperCrossAttention if gpu.capability == HOPPER else CrossAttention,
        ("fuser", "native"): Fuser,
        ("fuser", "native fp8"): Fp8Fuser,
    }
    return rows[network.name, name](model, plan, gpu)
