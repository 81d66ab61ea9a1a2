"""The sizes of an open model on the CPU: an ONNX Runtime executor each, over one set of fp32 weights."""

import platform
from collections.abc import Collection, Mapping
from typing import Any

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.lynx import FacePlan, Lynx, LynxPlan
from trt_wan.engines.shape import CameraPlan, Plan
from trt_wan.engines.store.graphs import require_graphs
from trt_wan.runtime.context.parts import ContextPlan
from trt_wan.runtime.events import Progress
from trt_wan.runtime.executors import Array, Observe
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor, require_memory
from trt_wan.runtime.job import Load
from trt_wan.runtime.networks.model import LynxModel, Model
from trt_wan.runtime.weights.stored import Tensors


class CpuSizes:
    def __init__(
        self, config: ModelConfig, weights: Mapping[Part, Mapping[str, Array]], observe: Observe | None
    ) -> None:
        self._config, self._weights, self._observe = config, weights, observe
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
    ) -> Model:
        if plan not in self._models:
            require_memory(self._config, plan)
        model = self._open(plan)
        if load.camera_ffn:
            self._beside(model, CameraPlan.beside(plan, load.camera_ffn))
        model.lynx = None if load.lynx is None else self._lynx(model, load.lynx)
        return model

    def _open(self, plan: Plan) -> Model:
        if plan not in self._models:
            executor = OnnxRuntimeExecutor(require_graphs(self._config, plan), self._bound)
            observed = self._observe(executor) if self._observe else executor
            self._executors[plan] = executor
            self._models[plan] = Model(self._config, plan, observed, self._weights)
        return self._models[plan]

    def _beside(self, model: Model, plan: Plan) -> None:
        """Adds the networks of `plan` to those of an open model."""
        self._executors[model.plan].add(require_graphs(self._config, plan), networks(self._config, plan))
        model.take(plan)

    def _lynx(self, model: Model, lynx: Lynx) -> LynxModel:
        self._beside(model, LynxPlan.of(model.plan, lynx.kind))
        face = self._open(FacePlan(precision=model.plan.precision)) if lynx.ref else None
        return LynxModel(lynx, face)

    def take(self, parts: Mapping[Part, Any]) -> None:
        for part, tensors in parts.items():
            self._bound.change(part, tensors, tuple(tensors))

    def change(self, transformer: Tensors, changed: Collection[str]) -> None:
        self._bound.change("transformer", transformer, changed)

    def resume(self) -> None:
        pass

    def close(self) -> None:
        self._models.clear()
        self._executors.clear()
        self._bound.release()
