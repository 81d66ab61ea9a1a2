"""TensorRT engines as segments: one execution context each, over scratch that the executor gives.

Nothing is compiled here, but TensorRT-RTX finishes an engine's kernels when its context is created, which
takes up to 5 s an engine, one after the other in a process. So engines that were never opened on this machine
are opened once in processes of their own, side by side, which leave the kernels in a cache file.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.engines.flavour import Flavour
from trt_wan.errors import GraphError
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import Note, Progress, silent

PROCESSES = 8  # at most; each takes half a GB of GPU memory while it works


def open_engines(
    gpu: Gpu,
    flavour: Flavour,
    plans: Mapping[str, bytes],
    kernel_cache: Path,
    progress: Progress = silent,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, "EngineSegment"]:
    """`plans` are engines by name, checked by the store; `kernel_cache` is where RTX keeps its kernels.

    `hashes` are the plans' sha256, if they are known: of a gigabyte they take a second.
    """
    known = hashes or {}
    if len(plans) > 1 and len(unfinished(flavour, plans, kernel_cache)) > 1:
        finish_kernels(flavour, plans, kernel_cache, progress)
    runtime = flavour.module.Runtime(flavour.module.Logger(flavour.module.Logger.ERROR))
    return {
        name: EngineSegment(gpu.handle, flavour.module, runtime, name, plan, kernel_cache, known.get(name))
        for name, plan in plans.items()
    }


class EngineSegment:
    """`stream` is the handle of the stream to compute on."""

    def __init__(
        self,
        stream: int,
        trt: Any,
        runtime: Any,
        name: str,
        plan: bytes,
        kernel_cache: Path,
        sha256: str | None = None,
    ) -> None:
        self._stream, self._trt, self.name = stream, trt, name
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
        self._cache_file = cache_file(kernel_cache, plan, sha256)
        self._cached = False
        if hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            if self._cache_file.exists():  # False for another GPU or driver: then it starts empty
                self._cached = bool(self._cache.deserialize(self._cache_file.read_bytes()))
            config.set_runtime_cache(self._cache)
        self._context = self._engine.create_execution_context(config)

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
            taken = self._context.set_tensor_address(name, address)
            assert taken, f"{self.name} has no tensor {name}"
        if not self._context.execute_async_v3(self._stream):
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


def cache_file(folder: Path, plan: bytes, sha256: str | None = None) -> Path:
    return folder / f"{(sha256 or hashlib.sha256(plan).hexdigest())[:32]}.kernels"


def unfinished(flavour: Flavour, plans: Mapping[str, bytes], kernel_cache: Path) -> list[str]:
    """Engines whose kernels TensorRT-RTX has not finished on this machine, the largest first."""
    if flavour.name != "tensorrt_rtx":
        return []
    new = [name for name, plan in plans.items() if not cache_file(kernel_cache, plan).exists()]
    return sorted(new, key=lambda name: len(plans[name]), reverse=True)


def finish_kernels(
    flavour: Flavour, plans: Mapping[str, bytes], kernel_cache: Path, progress: Progress
) -> None:
    """Opens the unfinished engines in other processes. What fails there shows when it is opened here."""
    new = unfinished(flavour, plans, kernel_cache)
    if not new:
        return
    progress(Note(f"finishing the kernels of {len(new)} engines for this GPU, once"))
    command = (sys.executable, "-m", "trt_wan.runtime.segments.finish_kernels", flavour.name)

    def finish(name: str) -> None:
        subprocess.run((*command, name, str(kernel_cache)), input=plans[name], capture_output=True)

    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        list(pool.map(finish, new))
