"""SAM2's engines in the store, beside the video model's: which they are, and the command that builds them."""

import hashlib

from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import GpuKind, Target
from trt_wan.engines.sam2.config import Sam2Config
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import EngineId

PREFIX = "sam2 "  # of the network's name in a manifest


class Sam2Engine(EngineId):
    """The key is the graph's and so says everything; `plan` is of the picture's size alone."""

    @property
    def shape(self) -> str:
        return ""

    @property
    def rebuild(self) -> str:
        target = "" if self.target == "current" else f" --target {self.target}"
        return f"{build_command(self.model)}{target} --flavour {self.flavour.name}"


def build_command(model: str) -> str:
    return f"trt-wan build --sam2 {model}"


def engine_of(
    config: Sam2Config, name: str, graph: bytes, target: Target, flavour: Flavour, gpu: GpuKind | None
) -> Sam2Engine:
    """`gpu` is for the target "current", and only then."""
    digest = hashlib.sha256(graph).hexdigest()
    size = Plan(config.image_size, config.image_size, 5)
    return Sam2Engine(f"{PREFIX}{name}", config.name, size, digest, target, flavour, gpu)
