"""Compiled engines on disk, in $TRT_WAN_HOME/engines: `<key>.plan`, and `<key>.json` that says what it is.

The key is a hash of everything that decides what the compiler writes: the graph, the target, the flavour and its
version, for the target "current" the GPU and its driver, and FORMAT. A network that is the same at two sizes is
compiled once. The manifest is written last and holds the plan's hash and its own, so a plan without a true manifest
does not exist, and one that was cut, edited or swapped is known before anything loads it. Reading takes no lock;
building takes one per key. What was used longest ago goes when the store outgrows TRT_WAN_ENGINES_GB.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from trt_wan.engines.plan import Plan
from trt_wan.engines.store import home
from trt_wan.engines.tensorrt import Flavour, Target
from trt_wan.errors import GraphError, UsageError

FORMAT = 1
DEFAULT_LIMIT_GB = 4.0


@dataclass(frozen=True)
class Gpu:
    """The GPU that an engine for the target "current" is bound to."""

    name: str
    driver: int  # major version


@dataclass(frozen=True)
class EngineId:
    """Which engine: what it is made from, and for messages the network, model and plan that want it."""

    network: str
    model: str
    plan: Plan
    source: str  # sha256 of the ONNX graph, or of the description of a network made without one
    target: Target
    flavour: str
    version: str
    gpu: Gpu | None = None  # for "current" only

    def __post_init__(self) -> None:
        assert (self.gpu is not None) == (self.target == "current"), f"{self.target} on {self.gpu}"

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, _origin(self)]).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        plan, gpu = self.plan, f" on {self.gpu.name}, driver {self.gpu.driver}" if self.gpu else ""
        return (
            f"{self.network} ({self.model}, {plan.width}x{plan.height}, {plan.frames} frames, {plan.precision}, for "
            f"{self.target}{gpu}, {self.flavour} {self.version})"
        )

    @property
    def rebuild(self) -> str:
        """The command that makes this engine."""
        plan = self.plan
        return (
            f"Run: trt-wan build --model {self.model} --size {plan.width}x{plan.height} --window {plan.frames} "
            f"--precision {plan.precision} --target {self.target} --flavour {self.flavour}"
        )


def engine_id(
    network: str, model: str, plan: Plan, source: bytes, target: Target, flavour: Flavour, gpu: Gpu | None
) -> EngineId:
    """`source`: the ONNX graph, or the description of a network made without one."""
    digest = hashlib.sha256(source).hexdigest()
    return EngineId(network, model, plan, digest, target, flavour.name, flavour.version, gpu)
