"""TensorRT engines as segments: one execution context each, over scratch that the executor gives.

Engines that are missing are compiled first; that is all of the compiler that is used here. TensorRT-RTX
finishes an engine's kernels when its context is created, which takes up to 5 s an engine, one after the other
in a process. So engines that were never opened on this machine are opened once in other processes, side by
side, which leave the kernels in a cache file (engines/store/kernels.py).
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.engines.store.engine_id import Recipe
from trt_wan.engines.store.engines import Obtained, obtain
from trt_wan.engines.store.files import keep
from trt_wan.engines.store.kernels import KernelCache
from trt_wan.errors import GraphError, MemoryShort, with_commands
from trt_wan.runtime.device.driver import driver_version
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import Note, Progress, reports_waiting, silent

PROCESSES = 8  # at most; each takes half a GB of GPU memory while it works


def open_engines(
    gpu: Gpu, recipes: Mapping[str, Recipe], progress: Progress = silent
) -> dict[str, "EngineSegment"]:
    """A segment for each recipe. Engines that are missing or damaged are built, which takes TensorRT-RTX a
    second at most.
    """
    if not recipes:
        return {}
    engines = {name: _obtained(recipe, recipes.values(), progress) for name, recipe in recipes.items()}
    flavour = next(iter(recipes.values())).engine.flavour
    cache = KernelCache(flavour.name, gpu.name, driver_version())
    if len(_unfinished(engines, cache)) > 1:
        _finish(engines, cache, progress)
    runtime = flavour.module.Runtime(flavour.module.Logger(flavour.module.Logger.ERROR))
    return {
        name: EngineSegment(
            gpu.handle, flavour.module, runtime, name, engine.plan, cache.file(engine.manifest.sha256)
        )
        for name, engine in engines.items()
    }


def finish_engines(gpu: Gpu, recipes: Iterable[Recipe], progress: Progress = silent) -> None:
    """Has the kernels of engines finished for this GPU, so that no run has to."""
    wanted = list(recipes)
    if wanted:
        engines = {recipe.engine.title: _obtained(recipe, wanted, progress) for recipe in wanted}
        cache = KernelCache(wanted[0].engine.flavour.name, gpu.name, driver_version())
        _finish(engines, cache, progress)


def _obtained(recipe: Recipe, spare: Iterable[Recipe], progress: Progress) -> Obtained:
    keys = {other.engine.key for other in spare}
    engine = obtain(recipe, keys, reports_waiting(progress))
    if engine.built:
        progress(Note(f"built {recipe.engine.title} in {engine.manifest.build_seconds:.1f} s"))
    return engine


def _unfinished(engines: Mapping[str, Obtained], cache: KernelCache) -> list[str]:
    """Engines whose kernels TensorRT-RTX has not finished on this machine, the largest first."""
    if cache.flavour != "tensorrt_rtx":
        return []
    new = [name for name, engine in engines.items() if not cache.file(engine.manifest.sha256).exists()]
    return sorted(new, key=lambda name: len(engines[name].plan), reverse=True)


def _finish(engines: Mapping[str, Obtained], cache: KernelCache, progress: Progress) -> None:
    """Opens the unfinished engines in other processes. A failure there comes again when this process opens
    the engine.
    """
    new = _unfinished(engines, cache)
    if not new:
        return
    progress(Note(f"finishing the kernels of {len(new)} engines for this GPU, once"))
    command = (sys.executable, "-m", "trt_wan.runtime.segments.finish_kernels", cache.flavour)

    def finish(name: str) -> None:
        file = cache.file(engines[name].manifest.sha256)
        subprocess.run((*command, name, str(file)), input=engines[name].plan, capture_output=True)

    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        list(pool.map(finish, new))


class EngineSegment:
    """`stream` is the handle of the stream to compute on; `kernels` the file of the engine's kernels."""

    def __init__(self, stream: int, trt: Any, runtime: Any, name: str, plan: bytes, kernels: Path) -> None:
        self._stream, self._trt, self.name = stream, trt, name
        self._runtime = runtime  # TensorRT wants it to outlive its engines
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise GraphError(
                f"TensorRT refuses the engine of {name}.",
                with_commands(
                    "Remove it by its key, and the next run builds it again. Find the key:", "trt-wan list"
                ),
            )
        config = self._engine.create_runtime_config()
        if config is None:
            raise _no_context(name)
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache: Any = None
        self._kernels = kernels
        self._cached = False
        if hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            if self._cache is None:
                raise _no_context(name)
            with suppress(OSError):  # no file; TensorRT refuses a damaged one: then the cache starts empty
                self._cached = bool(self._cache.deserialize(kernels.read_bytes()))
            config.set_runtime_cache(self._cache)
        self._context = self._engine.create_execution_context(config)
        if self._context is None:
            raise _no_context(name)

    @property
    def scratch_bytes(self) -> int:
        return int(self._engine.device_memory_size_v2)

    def tensor(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and type of an input or output, for engines that no contract describes."""
        dtype = self._trt.nptype(self._engine.get_tensor_dtype(name))
        return tuple(int(d) for d in self._engine.get_tensor_shape(name)), np.dtype(dtype)

    def start(self, scratch: int) -> None:
        self._context.set_device_memory(scratch, self.scratch_bytes)

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise GraphError(f"TensorRT's engine of {self.name} takes no tensor {name}.", "Report it.")
        if not self._context.execute_async_v3(self._stream):
            raise GraphError(
                f"TensorRT could not run {self.name}.", "Report it, with what TensorRT wrote above."
            )

    def settle(self) -> None:
        """Keeps the kernels that TensorRT-RTX compiled, unless they came from the file."""
        if self._cache is not None and not self._cached:
            keep(self._kernels, bytes(self._cache.serialize()))
            self._cached = True  # also where it could not be kept: no later window tries again


def _no_context(name: str) -> MemoryShort:
    return MemoryShort(
        f"TensorRT could not open the engine of {name}; it returns nothing when GPU memory is short.",
        "Close other programs on the GPU, or use a smaller size or window.",
    )
