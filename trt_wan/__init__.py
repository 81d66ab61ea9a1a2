"""Wan2.2-Animate on TensorRT: one picture of a character and a driving video in, a finished video out."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trt_wan.api.pipeline import AnimateOutput, AnimatePipeline

__all__ = ["AnimateOutput", "AnimatePipeline"]
__version__ = "0.1.0"

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "runtime")):  # a checkout: the subpackages lie beside this folder
    __path__.append(os.path.dirname(_here))


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: `import trt_wan` alone stays cheap."""
    if name not in __all__:
        raise AttributeError(f"module 'trt_wan' has no attribute {name!r}")
    from trt_wan.api import pipeline

    return getattr(pipeline, name)
