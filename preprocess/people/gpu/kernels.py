"""Launches the kernels of frames.cu and heatmaps.cu on the GPU's compute stream.

`stretch` and `crop` write one picture [3, height, width] of a network's input, in the input's type. Addresses
are integers.
"""

from typing import Any

import cv2
import numpy as np

from trt_wan.preprocess.people import pose
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import Module, read_source

SOURCE = read_source(__package__, "frames.cu", "heatmaps.cu")
TYPES = ("float32", "float16")  # a network's input and output have one of them
NAMES = tuple(f"{name}_{kind}" for name in ("stretch", "crop", "decode") for kind in TYPES)
FRAME_THREADS = 64  # a block makes columns of one row
MAP_THREADS = 256


def macros() -> dict[str, object]:
    gaussian = cv2.getGaussianKernel(pose.BLUR, pose.SIGMA, cv2.CV_32F)[:, 0]
    return {
        "MEAN": _numbers(pose.MEAN),
        "STD": _numbers(pose.STD),
        "GAUSSIAN": _numbers(gaussian),
        "LEAST_HEAT": f"{pose.LEAST_HEAT}f",
        "LOW_HEAT": f"{pose.LOW_HEAT}f",
        "THREADS": MAP_THREADS,
    }


def _numbers(values: Any) -> str:
    return ",".join(f"{float(value)!r}f" for value in values)


class PeopleKernels:
    def __init__(self, gpu: Gpu) -> None:
        self._stream = gpu.stream
        self._module = Module(gpu.device, SOURCE, NAMES, macros())

    def stretch(
        self,
        kind: np.dtype[Any],
        frame: int,
        frame_width: int,
        taps: tuple[int, int],
        out: int,
        size: tuple[int, int],
    ) -> None:
        """The whole frame, in 0..1. `taps` are tables of columns and of rows, `size` is (width, height)."""
        self._picture(f"stretch_{kind.name}", frame, frame_width, taps, out, size)

    def crop(
        self,
        kind: np.dtype[Any],
        frame: int,
        frame_width: int,
        taps: tuple[int, int],
        out: int,
        size: tuple[int, int],
        bgr: bool,
    ) -> None:
        self._picture(f"crop_{kind.name}", frame, frame_width, taps, out, size, np.int32(bgr))

    def decode(self, kind: np.dtype[Any], maps: int, count: int, width: int, height: int, peaks: int) -> None:
        """`count` maps [height, width] to float32 [count, 3]."""
        arguments = (maps, peaks, np.int32(width), np.int32(height))
        self._module.launch(self._stream, f"decode_{kind.name}", count, MAP_THREADS, *arguments)

    def _picture(
        self,
        name: str,
        frame: int,
        frame_width: int,
        taps: tuple[int, int],
        out: int,
        size: tuple[int, int],
        *more: Any,
    ) -> None:
        width, height = size
        grid = (-(-width // FRAME_THREADS), height)
        arguments = (frame, np.int64(3 * frame_width), *taps, out, np.int32(width), np.int32(height), *more)
        self._module.launch(self._stream, name, grid, FRAME_THREADS, *arguments)


def people_kernels(gpu: Gpu) -> PeopleKernels:
    """Both networks share one set."""
    return gpu.once(__name__, lambda: PeopleKernels(gpu))
