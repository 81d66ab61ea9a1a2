"""The precisions a model can be built for: one row each.

Everything else stays in float32 at every precision (model_spec.md 1.9): the residual stream, latents,
modulation, the time path, norms and their statistics, RoPE tables, biases, scales, patch embeddings, head,
the face's motion.
"""

from dataclasses import dataclass
from typing import Literal

from trt_wan.engines.gpu import Capability
from trt_wan.errors import UsageError

FP8_CAPABILITY: Capability = (8, 9)  # Ada, the first with FP8 products

Precision = Literal["fp32", "bf16", "fp8", "int8"]


@dataclass(frozen=True)
class PrecisionRow:
    activation: Literal["float32", "bfloat16"]  # q, k, v, attention outputs, caches
    linear: Literal["float32", "bfloat16"]  # weights of linear layers and VAE convolutions
    # The type of the blocks' linear weights, if they have 8 bits. Their activations are quantised per token;
    # int8 stands in the rotated basis of engines/int8.py.
    quantised: Literal["", "float8_e4m3fn", "int8"] = ""

    @property
    def fp8(self) -> bool:
        return self.quantised == "float8_e4m3fn"


PRECISIONS: dict[Precision, PrecisionRow] = {
    "fp32": PrecisionRow("float32", "float32"),
    "bf16": PrecisionRow("bfloat16", "bfloat16"),
    "fp8": PrecisionRow("bfloat16", "bfloat16", "float8_e4m3fn"),
    "int8": PrecisionRow("bfloat16", "bfloat16", "int8"),
}


def best_precision(capability: Capability) -> Precision:
    """FP8 where the GPU has it, else bf16."""
    return "fp8" if capability >= FP8_CAPABILITY else "bf16"


def require_fp8(precision: Precision, capability: Capability) -> None:
    """Raises UsageError if the precision needs FP8 and GPUs of this capability have none."""
    if PRECISIONS[precision].fp8 and capability < FP8_CAPABILITY:
        major, minor = capability
        raise UsageError(
            f"Precision {precision} needs compute capability 8.9 or later; this GPU has {major}.{minor}.",
            "Use --precision bf16.",
        )
