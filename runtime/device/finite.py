"""Whether an array on the GPU holds a NaN or an infinity, without a download of the array."""

from typing import Any

import numpy as np

from trt_wan.runtime.device.checked import cuda
from trt_wan.runtime.device.gpu import MOST_BLOCKS, DeviceArray, Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, read_source

SOURCE = read_source(__package__, "finite.cu")
NAMES = ("not_finite_4", "not_finite_2", "not_finite_1")
MASKS = {"float32": 0x7F80_0000, "bfloat16": 0x7F80, "float16": 0x7C00, "float8_e4m3fn": 0x7F}


def is_finite(gpu: Gpu, array: DeviceArray) -> bool:
    """Waits for the GPU. Integers are finite."""
    from cuda.bindings import runtime

    if array.dtype.name not in MASKS or not array.size:
        return True
    module: Module = gpu.once(SOURCE, lambda: Module(gpu.device, SOURCE, NAMES))
    memory: Any = gpu.once("found", lambda: gpu.allocate(4))
    found = gpu.view(int(memory.handle), (1,), np.uint32)
    cuda(runtime.cudaMemsetAsync(found.address, 0, found.nbytes, gpu.handle))
    mask, count = np.uint32(MASKS[array.dtype.name]), np.int64(array.size)
    grid = min(-(-array.size // THREADS), MOST_BLOCKS)
    kernel = f"not_finite_{array.dtype.itemsize}"
    module.launch(gpu.stream, kernel, grid, THREADS, found.address, array.address, count, mask)
    return not np.asarray(found)[0]
