"""The GPU, its driver, the flavours of TensorRT, and the choices of executor and precision."""

from dataclasses import dataclass
from typing import Any

from trt_wan.checks.check import Check, of_error, ok
from trt_wan.engines.flavour import FLAVOURS, Flavour, choose_flavour
from trt_wan.engines.gpu import Capability
from trt_wan.engines.precision import Precision, best_precision
from trt_wan.errors import EnvironmentBroken
from trt_wan.runtime.device.driver import driver_version, has_nvidia_gpu


@dataclass(frozen=True)
class FoundGpu:
    name: str
    capability: Capability
    bytes: int
    free: int


def found_gpu() -> FoundGpu | str:
    """The first GPU, or why there is none. No kernel is compiled, as `Gpu` would."""
    try:
        from cuda.bindings import runtime
        from cuda.core import Device

        device = Device(0)
        device.set_current()
        error, free, total = runtime.cudaMemGetInfo()
        if int(error):
            return f"CUDA says {error.name}"
        major, minor = device.compute_capability
        return FoundGpu(str(device.name), (major, minor), int(total), int(free))
    except Exception as error:  # without a driver cuda.core raises the loader's error, of any class
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def machine_checks(gpu: FoundGpu | str) -> tuple[list[Check], Flavour | None]:
    """The checks, and the flavour that a job would take; None: the CPU."""
    flavours = [ok(name, _flavour(name, gpu)) for name in FLAVOURS]
    if isinstance(gpu, str):
        if has_nvidia_gpu():
            fix = "Install or update NVIDIA's driver; nvidia-smi has to show the GPU."
            return [Check("gpu", "fault", f"An NVIDIA GPU is here, but {gpu}.", fix), *flavours], None
        text = f"No NVIDIA GPU ({gpu}): jobs run on the CPU in fp32, which is for tests."
        return [Check("gpu", "warning", text, "Use a machine with an NVIDIA GPU."), *flavours], None
    major, minor = gpu.capability
    memory = f"{gpu.free / 1e9:.1f} of {gpu.bytes / 1e9:.1f} GB free"
    checks = [
        ok("gpu", f"{gpu.name}, compute capability {major}.{minor}, {memory}, driver {driver_version()}")
    ]
    try:
        chosen = choose_flavour(None, gpu.capability)
    except EnvironmentBroken as error:
        return [*checks, *flavours, of_error("executor", error)], None
    executor = ok("executor", f"{chosen.name} {chosen.version} ({chosen.reason})")
    return [*checks, *flavours, executor], chosen


def precision_check(gpu: FoundGpu | str, flavour: Flavour | None) -> tuple[Check, Precision]:
    """The automatic choice of open_model."""
    if isinstance(gpu, str) or flavour is None:
        return ok("precision", "fp32, the only one of ONNX Runtime on the CPU"), "fp32"
    precision = best_precision(gpu.capability)
    why = "the GPU has FP8 products" if precision == "fp8" else "the GPU has no FP8 products"
    return ok("precision", f"{precision} ({why})"), precision


def _flavour(name: Any, gpu: FoundGpu | str) -> str:
    """Whether one flavour can run here. That none can is a fault of `executor`."""
    try:
        found = choose_flavour(name, None if isinstance(gpu, str) else gpu.capability)
    except EnvironmentBroken as error:
        return error.message.removeprefix("No TensorRT can be used here: ").rstrip(".")
    return f"{found.version}, {'builds for other GPUs' if isinstance(gpu, str) else 'can run here'}"
