"""TensorRT engines on one GPU: contexts that share one scratch, arrays that stay on the device.

Inputs may be numpy arrays (uploaded) or arrays of the device; outputs are arrays of the device, which numpy
functions accept and then download. One execution context per network serves all sets of its weights:
addresses change, nothing else does. Nothing is compiled here, but TensorRT-RTX finishes its kernels on first
use and keeps them in a cache file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from trt_wan.engines.contract import Network
from trt_wan.engines.tensorrt import Flavour
from trt_wan.errors import GraphError
from trt_wan.runtime.device.gpu import DeviceArray, Gpu
from trt_wan.runtime.device.weights import DeviceWeights
from trt_wan.runtime.executors import Array


class TensorRtExecutor:
    """`plans` are engines by network, checked by the store; `kernel_cache` is where RTX keeps its kernels."""

    def __init__(self, gpu: Gpu, flavour: Flavour, plans: Mapping[str, bytes], kernel_cache: Path) -> None:
        self.gpu = gpu
        self._trt = flavour.module
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
        self._kernel_cache = kernel_cache
        self._caches: dict[Path, Any] = {}
        self._engines = {name: self._open(name, plan) for name, plan in plans.items()}
        self._contexts = {name: self._context(name, plan) for name, plan in plans.items()}
        self._scratch: Any = None
        self._weights: DeviceWeights

    @property
    def scratch_bytes(self) -> int:
        """What the largest engine needs; all share it."""
        return max(1, *(int(engine.device_memory_size_v2) for engine in self._engines.values()))

    def start(self, arena: int, weights: DeviceWeights) -> None:
        """Takes the memory: `arena` bytes for activations, and the scratch."""
        size = self.scratch_bytes
        self._scratch = self.gpu.allocate(size)
        for context in self._contexts.values():
            context.set_device_memory(int(self._scratch.handle), size)
        self.gpu.reserve(arena)
        self._weights = weights

    def place(self, array: Array) -> Array:
        return cast(Array, self.gpu.upload(np.asarray(array)))

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        return cast(Array, self.gpu.combine(terms))

    def release(self, names: set[str]) -> None:
        self._weights.release(names)

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        context = self._contexts[network.name]
        given = {name: self._on_device(value, network, name) for name, value in inputs.items()}
        outputs = [self.gpu.empty(t.shape, t.dtype) for t in network.outputs]
        for name, array in (given | self._weights.bind(network, n)).items():
            context.set_tensor_address(name, array.address)
        for contract, array in zip(network.outputs, outputs, strict=True):
            context.set_tensor_address(contract.name, array.address)
        if not context.execute_async_v3(self.gpu.handle):
            raise GraphError(
                f"TensorRT could not run {network.name}.", "Report it, with what TensorRT wrote above."
            )
        self._weights.used(network, n)
        return cast(tuple[Array, ...], tuple(outputs))

    def settle(self) -> None:
        """Writes what TensorRT-RTX compiled in this run, for the next start."""
        for path, cache in self._caches.items():
            blob = bytes(cache.serialize())
            if not path.exists() or path.stat().st_size != len(blob):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".partial")
                temporary.write_bytes(blob)
                temporary.replace(path)

    def _on_device(self, value: Any, network: Network, name: str) -> DeviceArray:
        if isinstance(value, DeviceArray):
            return value
        dtype = next(t.dtype for t in network.inputs if t.name == name)
        return self.gpu.upload(np.asarray(value, np.dtype(dtype)))

    def _open(self, name: str, plan: bytes) -> Any:
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise GraphError(
                f"TensorRT refuses the engine of {name}.",
                "Rebuild it: trt-wan rm ENGINE, then trt-wan build.",
            )
        return engine

    def _context(self, name: str, plan: bytes) -> Any:
        config = self._engines[name].create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if hasattr(config, "create_runtime_cache"):  # TensorRT-RTX: kernels are finished on this machine
            cache = config.create_runtime_cache()
            path = self._kernel_cache / f"{hashlib.sha256(plan).hexdigest()[:32]}.kernels"
            if path.exists():
                cache.deserialize(path.read_bytes())  # False for another GPU or driver: then it starts empty
            config.set_runtime_cache(cache)
            self._caches[path] = cache
        return self._engines[name].create_execution_context(config)
