"""CUDA sources compiled by NVRTC for one GPU, and their kernels launched by name.

numbers.cuh stands in front of every source. Compiled code is kept on disk (cubins.py).
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from trt_wan.runtime.device.checked import cuda, cuda_core
from trt_wan.runtime.device.cubins import kept

NAMES = ("combine", "random_float32", "random_bfloat16", "random_float8_e4m3fn")
THREADS = 256
MAX_TERMS = 6  # in a linear combination; UniPC's corrector has four


def read_source(package: str, *names: str) -> str:
    """The files of a package, one after the other."""
    return "".join((files(package) / name).read_text(encoding="utf-8") for name in names)


SOURCE = read_source(__package__, "arrays.cu")  # its kernels are NAMES


def headers(*names: str) -> str:
    """To stand in front of a source: "attention" of one that attends, "hopper" of one accelerated for 9.0."""
    return read_source(__package__, *(f"{name}.cuh" for name in ("shared", *names)))


ATTENTION, HOPPER = headers("attention"), headers("hopper")


def compile_source(
    source: str,
    capability: tuple[int, int],
    macros: Mapping[str, object] | None = None,
    *,
    accelerated: bool = False,
) -> Any:
    """The code of kernels for GPUs of a compute capability, compiled once per machine; needs no GPU. In a
    process the same code is the same object.

    `accelerated` code may use instructions of this capability alone, such as Hopper's wgmma.
    """
    from cuda.core import Program, ProgramOptions

    source = read_source(__package__, "numbers.cuh") + source
    standard, arch = "c++17", "sm_{}{}".format(*capability) + "a" * accelerated
    defined = [(name, str(value)) for name, value in (macros or {}).items()]

    def compile() -> bytes:
        options = ProgramOptions(std=standard, arch=arch, define_macro=defined or None)
        return bytes(Program(source, "c++", options).compile("cubin").code)

    origin = (source, standard, arch, *(f"{name}={value}" for name, value in defined))
    return _loaded(kept(origin, compile))


@cache
def _loaded(cubin: bytes) -> Any:
    """One object for the same code: cuda.core (to 1.2.2 at least) never unloads a library. If each Gpu loaded
    its own, every model that was opened and closed would leave its kernels on the GPU.
    """
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin)


class Module:
    """The kernels `names` of a source, compiled for `device`."""

    def __init__(
        self,
        device: Any,
        source: str,
        names: Sequence[str],
        macros: Mapping[str, object] | None = None,
        *,
        accelerated: bool = False,
        code: Any = None,
    ) -> None:
        """`code` is the source's, if it was compiled before."""
        if code is None:
            code = compile_source(source, tuple(device.compute_capability), macros, accelerated=accelerated)
        with cuda_core():
            self._kernels = {name: code.get_kernel(name) for name in names}
        self._functions: dict[str, Any] = {}

    def launch(
        self,
        stream: Any,
        name: str,
        grid: int | tuple[int, ...],
        threads: int,
        *arguments: Any,
        shared: int = 0,
    ) -> None:
        """Enqueues kernel `name`. Addresses are Python integers, other numbers are numpy's, of its types, and
        structures that are passed by value are numpy's arrays.
        """
        if any(isinstance(argument, np.ndarray) for argument in arguments):
            return self._launch_by_value(stream, name, grid, threads, arguments, shared)
        from cuda.core import LaunchConfig, launch

        config = LaunchConfig(grid=grid, block=threads, shmem_size=shared)
        with cuda_core():
            launch(stream, config, self._kernels[name], *arguments)

    def allow_shared(self, name: str, size: int) -> None:
        """Call before the first launch of `name` with more than 48 KB of shared memory."""
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        cuda(driver.cuFuncSetAttribute(self._function(name), attribute, size))

    def _launch_by_value(
        self,
        stream: Any,
        name: str,
        grid: int | tuple[int, ...],
        threads: int,
        arguments: Sequence[Any],
        shared: int,
    ) -> None:
        """cuda.core passes numbers only."""
        from cuda.bindings import driver

        held = b""
        places = []
        for argument in arguments:
            places.append(len(held))
            value = argument.to_bytes(8, "little") if isinstance(argument, int) else argument.tobytes()
            held += value + b"\0" * (-len(value) % 8)
        memory = ctypes.create_string_buffer(held, len(held))
        start = ctypes.addressof(memory)
        pointers = (ctypes.c_void_p * len(places))(*(start + place for place in places))
        blocks = (*((grid,) if isinstance(grid, int) else grid), 1, 1)[:3]
        where = shared, int(stream.handle), ctypes.addressof(pointers), 0
        cuda(driver.cuLaunchKernel(self._function(name), *blocks, threads, 1, 1, *where))

    def _function(self, name: str) -> Any:
        from cuda.bindings import driver

        if name not in self._functions:
            self._functions[name] = cuda(driver.cuKernelGetFunction(int(self._kernels[name].handle)))
        return self._functions[name]
