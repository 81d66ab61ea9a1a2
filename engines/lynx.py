"""Lynx: sizes of its networks, which of its adapters act, and the shapes that their graphs have.

Lynx adds the identity of a face to the transformer in two ways (addons_spec.md 2): the IP adapter adds
attention to tokens of a face embedding to every cross-attention, the ref adapter adds attention to features
of a face picture to every self-attention. `LynxPlan` has the networks of both at a window's size. `FacePlan`
has those of a forward of the transformer on the face picture, one slot of 256x256, which runs once per job.
"""

from dataclasses import dataclass
from typing import Literal

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan

Kind = Literal["full", "lite"]  # lite: an IP adapter in every second block, without registers

FACE_SIDE = 256  # px of the picture that the ref adapter sees
EMBEDDING = 512  # numbers of a face embedding
LITE_INTERVAL = 2  # blocks


@dataclass(frozen=True)
class LynxConfig:
    """The resampler's sizes, and the extra tokens of the full IP adapter."""

    dim: int = 1280
    layers: int = 4
    heads: int = 20
    head_dim: int = 64
    queries: int = 16
    registers: int = 16
    lite_dim: int = 2048  # the width of a lite resampler's result; a full one has the transformer's
    eps: float = 1e-5

    def result_dim(self, model: ModelConfig, kind: Kind) -> int:
        return model.transformer.dim if kind == "full" else self.lite_dim

    def keys(self, kind: Kind) -> int:
        """Tokens that every IP adapter attends to."""
        return self.queries + (self.registers if kind == "full" else 0)


# A model's own config decides the folders of its graphs, which exist without Lynx.
SIZES = {
    "14b": LynxConfig(),
    "tiny": LynxConfig(dim=24, layers=2, heads=3, head_dim=8, queries=4, registers=3, lite_dim=40),
}


def lynx_of(model: ModelConfig) -> LynxConfig:
    return SIZES[model.name]


@dataclass(frozen=True)
class Lynx:
    """The adapters that act in a job. `kind` is the IP adapter's."""

    ip: bool
    ref: bool
    kind: Kind = "full"

    @property
    def networks(self) -> tuple[str, ...]:
        """Those that run at the window's size."""
        norm = ("lynx_ip_norm",) if self.kind == "full" else ()
        ip = ("lynx_resampler", "lynx_ip_kv", *norm, "lynx_ip")
        return (*(ip if self.ip else ()), *(("lynx_ref",) if self.ref else ()))


def ip_blocks(model: ModelConfig, kind: Kind) -> range:
    """The blocks with an IP adapter, in the order of its sets of weights."""
    return range(0, model.transformer.layers, 1 if kind == "full" else LITE_INTERVAL)


@dataclass(frozen=True)
class LynxPlan(Plan):
    """The networks for windows of this shape."""

    kind: Kind = "full"

    @staticmethod
    def of(plan: Plan, kind: Kind) -> "LynxPlan":
        return LynxPlan(plan.width, plan.height, plan.frames, plan.precision, kind=kind)

    def build_command(self, model: str) -> tuple[str, ...]:
        plain = Plan(self.width, self.height, self.frames, self.precision)
        return (*plain.build_command(model), "--lynx", self.kind)


def lynx_plans(plan: Plan, adapters: Lynx) -> tuple[Plan, ...]:
    """The plans that a job needs beside `plan`."""
    face = (FacePlan(precision=plan.precision),) if adapters.ref else ()
    return (LynxPlan.of(plan, adapters.kind), *face)


@dataclass(frozen=True)
class FacePlan(Plan):
    """One slot of a face picture."""

    width: int = FACE_SIDE
    height: int = FACE_SIDE
    frames: int = 5  # the least that a Plan allows; there is one slot

    @property
    def slots(self) -> int:
        return 1

    def build_command(self, model: str) -> tuple[str, ...]:
        return LynxPlan(precision=self.precision).build_command(model)
