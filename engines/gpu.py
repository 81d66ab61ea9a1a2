"""Facts about GPUs: their compute capabilities, the targets that engines are built for, the range of FP8."""

from dataclasses import dataclass
from typing import Literal

Capability = tuple[int, int]
Target = Literal["current", "sm80", "sm86", "sm89", "sm120", "sm121"]

DATA_CENTRE: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0), (10, 3))
HOPPER: Capability = (9, 0)  # TensorRT-RTX never listed it; 1.6 runs there all the same, 1.7 refuses

# The constant scales of FP8 attention cover this range of k and v, and head_dim^-0.5 times it of q. Larger
# values saturate (h200_measurements.md).
FP8_ATTENTION_RANGE = 30.0


@dataclass(frozen=True)
class GpuKind:
    """An engine for the target "current" is bound to this."""

    name: str
    driver: int  # its CUDA version, major number


@dataclass(frozen=True)
class TargetRow:
    compute_capability: str  # TensorRT-RTX's name of it
    fp8: bool  # whether it can have FP8 engines; for "current" TensorRT decides


TARGETS: dict[Target, TargetRow] = {
    "current": TargetRow("CURRENT", fp8=True),
    "sm80": TargetRow("SM80", fp8=False),
    "sm86": TargetRow("SM86", fp8=False),
    "sm89": TargetRow("SM89", fp8=True),
    "sm120": TargetRow("SM120", fp8=True),
    "sm121": TargetRow("SM121", fp8=True),
}
