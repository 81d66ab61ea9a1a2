"""Networks computed by native kernels between matrix products and convolutions of libraries."""

from collections.abc import Callable

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.gpu import HOPPER, Capability
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments import cudnn_library
from trt_wan.runtime.segments.segment import Segment

BF16_CAPABILITY: Capability = (8, 0)


def missing(network: str, capability: Capability, name: str = "native") -> str | None:
    """Why candidate `name` of a network cannot be used here, in a sentence. None if it can."""
    from trt_wan.runtime.segments.native.gemm import missing as missing_library

    vae = network in VAE
    if capability < BF16_CAPABILITY:
        return f"A GPU of compute capability {capability[0]}.{capability[1]} has no bf16 products."
    if vae and name == "native" and capability != HOPPER:
        return "Our convolution is for Hopper alone."
    return missing_library() or (cudnn_library.missing() if vae else None)


def open_native(network: Network, model: ModelConfig, plan: Plan, gpu: Gpu, name: str = "native") -> Segment:
    """The segment of candidate `name`: a part of a block in FP8 or int8, a fuser, or the VAE in bf16, whose
    candidates are "cudnn" and, with our convolution, "native".
    """
    if network.part == "vae":
        from trt_wan.runtime.segments.native.vae import Vae

        return Vae(network, model, gpu, own=name == "native")
    from trt_wan.runtime.segments.native.block import PARTS, CrossAttention
    from trt_wan.runtime.segments.native.cross_attention import HopperCrossAttention
    from trt_wan.runtime.segments.native.fuser import Fp8Fuser, Fuser

    rows: dict[tuple[str, str], Callable[[ModelConfig, Plan, Gpu], Segment]] = {
        **{(part, name): opened for part, opened in PARTS.items() for name in ("native", "native int8")},
        ("cross_attention", "native"): HopperCrossAttention if gpu.capability == HOPPER else CrossAttention,
        ("fuser", "native"): Fuser,
        ("fuser", "native fp8"): Fp8Fuser,
    }
    return rows[network.name, name](model, plan, gpu)
