"""Checks the results of CUDA calls: a failure is lack of memory, a broken environment or a fault of the GPU.

A fault such as an illegal access is sticky: every later call in the process fails with it too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trt_wan.errors import EnvironmentBroken, GpuFault, MemoryShort, TrtWanError

# Codes of cudaError_t and CUresult, which agree for these.
OUT_OF_MEMORY = 2
# Not initialised, driver too old, devices in use, no device, no such device, driver of another release.
UNUSABLE = frozenset({3, 34, 35, 36, 46, 100, 101, 803, 804})


def cuda(result: tuple[Any, ...]) -> Any:
    """The values that a function of cuda.bindings returned behind its error code: None, one, or a tuple.

    Raises MemoryShort, EnvironmentBroken or GpuFault by the code.
    """
    code, *values = result
    if int(code):
        raise failure(int(code), getattr(code, "name", str(int(code))))
    if len(values) > 1:
        return tuple(values)
    return values[0] if values else None


@contextmanager
def cuda_core() -> Iterator[None]:
    """Turns the errors of cuda.core, which carry the name of the code, into those of `cuda`."""
    from cuda.core._utils.cuda_utils import CUDAError

    try:
        yield
    except CUDAError as error:
        name = str(error).partition(":")[0]
        raise failure(_code(name), name) from error


def failure(code: int, name: str) -> TrtWanError:
    if code == OUT_OF_MEMORY:
        return MemoryShort(
            f"The GPU has too little free memory ({name}).",
            "Close other programs on the GPU, or lower --vram.",
        )
    if code in UNUSABLE:
        return EnvironmentBroken(
            f"CUDA cannot be used ({name}).",
            "See that nvidia-smi shows the GPU, and update the NVIDIA driver.",
        )
    return GpuFault(
        f"The GPU reported {name}.",
        "Start the program again; if it happens again, please report it with the command and the GPU.",
    )


def _code(name: str) -> int:
    """The number of a code; -1 for an unknown one."""
    from cuda.bindings import driver, runtime

    for codes in (runtime.cudaError_t, driver.CUresult):
        if name in codes.__members__:
            return int(codes[name])
    return -1
