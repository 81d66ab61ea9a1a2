"""Networks of the transformer computed by native kernels around FP8 matrix products."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
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


def open_native(network: Network, model: ModelConfig, plan: Plan, gpu: Gpu) -> Segment:
    """The segment of a part of a block in FP8; the parts are the rows of block.NATIVE."""
    from trt_wan.runtime.segments.native.block import NATIVE

    return NATIVE[network.name](model, plan, gpu)
