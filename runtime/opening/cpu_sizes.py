"""The sizes of an open model on the CPU: an ONNX Runtime executor each, over one set of fp32 weights."""

import platform
from collections.abc import Collection, Mapping
from typing import Any

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.lynx import FacePlan, Lynx, LynxPlan
from trt_wan.engines.shape import CameraPlan, Plan, ShardPlan
from trt_wan.engines.store.graphs import require_graphs
from trt_wan.runtime.context.parts import ContextPlan
from trt_wan.runtime.events import Progress
from trt_wan.runtime.executors import Array, Observe
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor, require_memory
from trt_wan.runtime.job import Load
from trt_wan.runtime.networks.model import ALONE, LynxModel, Model
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.sequence import HostSequence
from trt_wan.runtime.parallel.shards import Shards
from trt_wan.runtime.weights.stored import Tensors


class CpuSizes:
    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[Part, Mapping[str, Array]],
        observe: Observe | None,
        processes: int = 1,
    ) -> None:
        """`processes` of this machine compute the same job together."""
        self._config, self._weights, self._observe = config, weights, observe
        self._processes = processes
        self._bound = BoundWeights(weights)
        self._models: dict[Plan, Model] = {}
        self._executors: dict[Plan, OnnxRuntimeExecutor] = {}

    @property
    def numerics(self) -> tuple[str, ...]:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}", platform.machine(), platform.processor()

    def begin(
        self,
        plan: Plan,
        load: Load,
        context: ContextPlan | None,
        skip: Collection[str],
        progress: Progress,
        ranks: Ranks = ALONE,
        share: ShardPlan | None = None,
    ) -> Model:
        if plan not in self._models:
            require_memory(self._config, plan, self._processes)
        opened = share or plan
        model = self._open(plan, share)
        model.ranks = ranks
        if share is not None:
            model.sequence = HostSequence(ranks, Shards.of(self._config, share))
        if load.camera_ffn:
            self._beside(opened, CameraPlan.beside(plan, load.camera_ffn))
        model.lynx = None if load.lynx is None else self._lynx(opened, load.lynx)
        return model

    def _open(self, plan: Plan, share: ShardPlan | None = None) -> Model:
        opened = share or plan
        if opened not in self._models:
            executor = OnnxRuntimeExecutor(require_graphs(self._config, plan), self._bound, self._processes)
            observed = self._observe(executor) if self._observe else executor
            self._executors[opened] = executor
            self._models[opened] = Model(self._config, plan, observed, self._weights)
            if share is not None:
                self._beside(opened, share)
        return self._models[opened]

    def _beside(self, opened: Plan, plan: Plan) -> None:
        """Adds the networks of `plan` to those of an open model."""
        self._executors[opened].add(require_graphs(self._config, plan), networks(self._config, plan))
        self._models[opened].take(plan)

    def _lynx(self, opened: Plan, lynx: Lynx) -> LynxModel:
        model = self._models[opened]
        self._beside(opened, LynxPlan.of(model.plan, lynx.kind))
        face = self._open(FacePlan(precision=model.plan.precision)) if lynx.ref else None
        return LynxModel(lynx, face)

    def take(self, parts: Mapping[Part, Any]) -> None:
        for part, tensors in parts.items():
            self._bound.change(part, tensors, tuple(tensors))

    def change(self, transformer: Tensors, changed: Collection[str]) -> None:
        self._bound.change("transformer", transformer, changed)

    def resume(self) -> None:
        pass

    def abandon(self) -> None:
        pass  # a lost rank closes its sockets

    def close(self) -> None:
        self._models.clear()
        self._executors.clear()
        self._bound.release()
