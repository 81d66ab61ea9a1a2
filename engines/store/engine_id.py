"""Identifies an engine: the origin, which decides its key in the store, and a description for people."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trt_wan.engines.flavour import Flavour, Progress
from trt_wan.engines.gpu import GpuKind, Target
from trt_wan.engines.shape import Plan

FORMAT = 2  # raise it when the same origin no longer means the same engine, or the manifest changes

Kind = Literal["wan", "sam2", "onnx"]  # the video model, SAM2, a user's ONNX file


@dataclass(frozen=True)
class EngineId:
    """`about` and `precision` describe the engine in words. `rebuild` holds the arguments of the trt-wan
    command that builds it; it is empty for an engine that the next use builds.
    """

    kind: Kind
    network: str
    about: str
    precision: str
    rebuild: tuple[str, ...]
    source: str  # sha256 of the ONNX graph, or of the description of a network made without one
    target: Target
    flavour: Flavour
    gpu: GpuKind | None  # for the target "current", and only then

    def __post_init__(self) -> None:
        assert (self.gpu is not None) == (self.target == "current"), f"{self.target} on {self.gpu}"

    @property
    def key(self) -> str:
        """Covers no descriptions: a graph that is the same at two sizes is compiled once."""
        origin = (FORMAT, self.source, self.target, self.flavour.name, self.flavour.version, self.gpu)
        return hashlib.sha256(repr(origin).encode()).hexdigest()[:32]

    @property
    def title(self) -> str:
        made = f"{self.target}, {self.flavour.name} {self.flavour.version}"
        return f"engine {self.network} ({self.about}, {self.precision}, {made})"


@dataclass(frozen=True)
class Recipe:
    """An engine and the function that compiles it."""

    engine: EngineId
    compile: Callable[[Progress], bytes]


def wan_engine(
    network: str, model: str, plan: Plan, source: str, target: Target, flavour: Flavour, gpu: GpuKind | None
) -> EngineId:
    """An engine of the video model."""
    about = f"{model}, {plan.width}x{plan.height}, {plan.frames} frames"
    rebuild = (*plan.build_command(model), "--target", target, "--flavour", flavour.name)
    return EngineId("wan", network, about, plan.precision, rebuild, source, target, flavour, gpu)
