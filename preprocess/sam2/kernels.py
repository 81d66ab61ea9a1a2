"""SAM2's small kernels of frames.cu: resizing (resize_on_gpu.py), pointers side by side (transfer.py)."""

from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import Module, read_source

THREADS = 256
NAMES = ("across", "down", "gather_rows")
SOURCE = read_source(__package__, "frames.cu")


def sam2_kernels(gpu: Gpu) -> Module:
    return gpu.once(__name__, lambda: Module(gpu.device, SOURCE, NAMES))
