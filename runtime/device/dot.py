"""The dot product of two float32 arrays on the GPU, summed in float64."""

from typing import Any

import numpy as np

from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, read_source
from trt_wan.runtime.device.slots import on_device

SOURCE = read_source(__package__, "dot.cu")
NAMES = ("dot",)
BLOCKS = 512  # the kernel strides over the rest; the host adds their sums


def dot(gpu: Gpu, x: Any, y: Any) -> float:
    """Waits for the GPU."""
    x, y = on_device(gpu, x), on_device(gpu, y)
    assert x.size == y.size and x.dtype == y.dtype == np.float32, f"{x.shape} {x.dtype}, {y.shape} {y.dtype}"
    module: Module = gpu.once(SOURCE, lambda: Module(gpu.device, SOURCE, NAMES))
    memory: Any = gpu.once("partial sums", lambda: gpu.allocate(BLOCKS * 8))
    partial = gpu.view(int(memory.handle), (BLOCKS,), np.float64)
    numbers = x.address, y.address, np.int64(x.size), partial.address
    module.launch(gpu.stream, "dot", BLOCKS, THREADS, *numbers)
    return float(np.asarray(partial).sum())
