"""TensorRT engines as segments: one execution context each, over scratch that the executor gives.

Nothing is compiled here, but TensorRT-RTX finishes an engine's kernels when its context is created and keeps
them in a cache file. That takes seconds for some, so contexts are created side by side.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trt_wan.engines.tensorrt import Flavour
from trt_wan.errors import GraphError
from trt_wan.runtime.device.gpu import Gpu

THREADS = 16


def open_engines(
    gpu: Gpu, flavour: Flavour, plans: Mapping[str, bytes], kernel_cache: Path
) -> dict[str, "EngineSegment"]:
    """`plans` are engines by name, checked by the store; `kernel_cache` is where RTX keeps its kernels."""
    runtime = flavour.module.Runtime(flavour.module.Logger(flavour.module.Logger.ERROR))

    def opened(name: str) -> EngineSegment:
        gpu.device.set_current()  # CUDA's current device is a thread's own
        return EngineSegment(gpu, flavour.module, runtime, name, plans[name], kernel_cache)

    with ThreadPoolExecutor(max_workers=min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(plans, pool.map(opened, plans), strict=True))


class EngineSegment:
    def __init__(self, gpu: Gpu, trt: Any, runtime: Any, name: str, plan: bytes, kernel_cache: Path) -> None:
        self.gpu, self.name = gpu, name
        self._runtime = runtime  # TensorRT wants it to outlive its engines
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise GraphError(
                f"TensorRT refuses the engine of {name}.",
                "Rebuild it: trt-wan rm ENGINE, then trt-wan build.",
            )
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache: Any = None
        self._cache_file = kernel_cache / f"{hashlib.sha256(plan).hexdigest()[:32]}.kernels"
        self._cached = False
        if hasattr(config, "create_runtime_cache"):  # TensorRT-RTX: kernels are finished on this machine
            self._cache = config.create_runtime_cache()
            if self._cache_file.exists():  # False for another GPU or driver: then it starts empty
                self._cached = bool(self._cache.deserialize(self._cache_file.read_bytes()))
            config.set_runtime_cache(self._cache)
        self._context = self._engine.create_execution_context(config)

    @property
    def scratch_bytes(self) -> int:
        return int(self._engine.device_memory_size_v2)

    def start(self, scratch: int) -> None:
        self._context.set_device_memory(scratch, self.scratch_bytes)

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            taken = self._context.set_tensor_address(name, address)
            assert taken, f"{self.name} has no tensor {name}"
        if not self._context.execute_async_v3(self.gpu.handle):
            raise GraphError(
                f"TensorRT could not run {self.name}.", "Report it, with what TensorRT wrote above."
            )

    def settle(self) -> None:
        """Writes what TensorRT-RTX compiled, unless that came from the file."""
        if self._cache is None or self._cached:
            return
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._cache_file.with_suffix(f".{os.getpid()}.partial")
        temporary.write_bytes(bytes(self._cache.serialize()))
        temporary.replace(self._cache_file)
        self._cached = True
