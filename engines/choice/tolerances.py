"""How far from fp32 a network may be: the one table, by network, precision and tier.

The error is relative, the norm of the difference over the norm of the fp32 result, on the same inputs and
weights. FP8 weights count as the numbers they stand for, so only rounding on the way remains. A row is about
one and a half times the error of its number format, so that another order of summation passes and a wrong
kernel, which is off by 6e-2 and more (docs/log.md: SM89's attn_out on an H200), does not. Figures
"measured" are of the tiny model on an H200 (docs/log.md).
"""

from dataclasses import dataclass

from trt_wan.engines.choice.candidates import BF16, INT8, VAE, Tier
from trt_wan.engines.precision import Precision


@dataclass(frozen=True)
class Tolerance:
    networks: tuple[str, ...]  # empty: every network
    precisions: tuple[Precision, ...]
    largest: float
    tier: Tier | None = None  # None: all


# The first row that fits counts.
TOLERANCES = (
    # fp32 with TF32 convolutions and products, which cannot be switched off: 4.1e-3 measured (the motion
    # encoder's 37 convolutions), then 2.7e-3 (VAE encode).
    Tolerance((), ("fp32",), 6e-3),
    # bf16 rounds by 1.7e-3 (rms), and attention rounds its logits' operands, probabilities and result: 6.4e-3
    # measured in TensorRT, 2.4e-3 in numpy.
    Tolerance(("attention", "uni3c_attention"), BF16, 1e-2, "exact"),
    # E4M3 rounds q, k, v and probabilities by 2.6e-2 each: 5.4e-2 on Gaussian inputs, 6.1e-2 with outlier
    # channels (h200_measurements.md); sharp attention costs 1e-1, and is not measured here.
    Tolerance(("attention",), BF16, 8e-2, "fast"),
    # The same rounding, against a reference that keeps the same blocks.
    Tolerance(("sparse_attention",), BF16, 8e-2),
    # E4M3 activations, with a scale per token, are 2.6e-2 off at most: measured in both; in numpy, at the
    # 14B's sizes with outlier channels, 2.3e-2.
    Tolerance(("attn_in", "attn_out", "context_kv", "uni3c_in", "uni3c_add"), ("fp8",), 4e-2),
    # int8 tokens in the rotated basis, in numpy at the 14B's sizes with outlier channels: 9.8e-3, 1.0e-2 and
    # 1.2e-2; without the rotation 6.6e-2, 8.8e-2 and 6.4e-2.
    Tolerance(("attn_in", "attn_out", "ffn"), INT8, 1.7e-2),
    # FP8 rounds a fuser's weights too, which are bf16 otherwise: in numpy, at the 14B's sizes, 4.4e-2 of the
    # addition, of which activations alone are 3.0e-2.
    Tolerance(("fuser",), ("fp8",), 6.5e-2, "fast"),
    # Two FP8 products in a row in the FFN: in numpy, at the 14B's sizes, 3.3e-2 of the addition to the
    # residual stream, which is how candidates are compared; measured 2.9e-2 of the whole stream.
    Tolerance(("ffn", "uni3c_out"), ("fp8",), 5e-2),
    # Some thirty bf16 convolutions one after the other: 1.4e-2 measured.
    Tolerance(VAE, BF16, 2.1e-2),
    # One or two bf16 layers, or float32 throughout: at most 6.4e-3 measured.
    Tolerance((), BF16, 1e-2),
)


def tolerance(network: str, precision: Precision, tier: Tier) -> float:
    """The largest relative error against fp32. The tier `turbo` has the rows of `fast`."""
    tier = "fast" if tier == "turbo" else tier
    return next(
        row.largest
        for row in TOLERANCES
        if precision in row.precisions
        and row.tier in (tier, None)
        and (network in row.networks or not row.networks)
    )
