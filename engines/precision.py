"""The precisions a model can be built for: one row each.

Everything else stays in float32 at every precision (model_spec.md 1.9): the residual stream, latents,
modulation, the time path, norms and their statistics, RoPE tables, biases, scales, patch embeddings, head,
the face's motion.
"""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class PrecisionRow:
    activation: Literal["float32", "bfloat16"]  # q, k, v, attention outputs, caches
    linear: Literal["float32", "bfloat16"]  # weights of linear layers and VAE convolutions
    # Linear weights of the transformer's blocks are FP8, their activations quantised per token.
    fp8: bool = False


PRECISIONS: dict[Precision, PrecisionRow] = {
    "fp32": PrecisionRow("float32", "float32"),
    "bf16": PrecisionRow("bfloat16", "bfloat16"),
    "fp8": PrecisionRow("bfloat16", "bfloat16", fp8=True),
}
