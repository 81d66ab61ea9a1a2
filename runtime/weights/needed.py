"""The tensors that a file needs as a part: those of its kind, for Lynx's IP adapter and resampler."""

from trt_wan.engines.checkpoint import LYNX_PARTS, required_tensors
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.lynx import Kind, lynx_of
from trt_wan.runtime.weights.checkpoint import Checkpoint

RESULT = "proj_out.weight"  # its width tells a resampler's kind


def kind_of(checkpoint: Checkpoint, model: ModelConfig) -> Kind:
    """The kind of an IP adapter or a resampler. An IP adapter with registers is full."""
    if RESULT in checkpoint:
        return "lite" if checkpoint.shape(RESULT)[:1] == (lynx_of(model).lite_dim,) else "full"
    return "full" if any(name.endswith("registers") for name in checkpoint) else "lite"


def needed(checkpoint: Checkpoint, model: ModelConfig, part: Part) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the file must have."""
    kind = kind_of(checkpoint, model) if part in LYNX_PARTS and part != "lynx_ref" else "full"
    return required_tensors(model, part, kind)
