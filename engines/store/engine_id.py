"""Which engine: where it comes from, which decides its key in the store, and for whom, which people read."""

import hashlib
from dataclasses import dataclass

from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import GpuKind, Target
from trt_wan.engines.shape import Plan

FORMAT = 1  # raise it when the same origin no longer means the same engine


@dataclass(frozen=True)
class EngineId:
    network: str
    model: str
    plan: Plan
    source: str  # sha256 of the ONNX graph, or of the description of a network made without one
    target: Target
    flavour: Flavour
    gpu: GpuKind | None  # for the target "current", and only then

    def __post_init__(self) -> None:
        assert (self.gpu is not None) == (self.target == "current"), f"{self.target} on {self.gpu}"

    @property
    def key(self) -> str:
        """Network, model and plan are not in it: a graph that is the same at two sizes is compiled once."""
        origin = (FORMAT, self.source, self.target, self.flavour.name, self.flavour.version, self.gpu)
        return hashlib.sha256(repr(origin).encode()).hexdigest()[:32]

    @property
    def title(self) -> str:
        made = f"{self.target}, {self.flavour.name} {self.flavour.version}"
        return f"engine {self.network} ({self.model}, {self.shape}{made})"

    @property
    def shape(self) -> str:
        """In the title, where the model's name does not say it."""
        return f"{self.plan.width}x{self.plan.height}, {self.plan.frames} frames, {self.plan.precision}, "

    @property
    def rebuild(self) -> str:
        """The command that makes it."""
        plan = self.plan
        return (
            f"trt-wan build --model {self.model} --size {plan.width}x{plan.height} --window {plan.frames} "
            f"--precision {plan.precision} --target {self.target} --flavour {self.flavour.name}"
        )
