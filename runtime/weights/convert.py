"""The kernels that turn weights as their file stores them into the types of the engines (convert.cu).

Addresses are of the device. `scales` is 0 where the stored numbers are the weights themselves.
"""

from typing import Any

import numpy as np

from trt_wan.runtime.device.gpu import MOST_BLOCKS, Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, read_source

SOURCES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
TARGETS = ("float32", "bfloat16", "float16")
NAMES = (
    *(f"convert_{source}_to_{target}" for source in SOURCES for target in TARGETS),
    *(f"quantise_{source}" for source in SOURCES),
)
SOURCE = read_source(__package__, "convert.cu")


class Converter:
    def __init__(self, gpu: Gpu) -> None:
        self._module = Module(gpu.device, SOURCE, NAMES)

    def convert(
        self,
        stream: Any,
        types: tuple[np.dtype[Any], np.dtype[Any]],
        addresses: tuple[int, int, int],
        rows: int,
        inner: int,
    ) -> None:
        """[rows, inner] numbers from the first type to the second. `addresses` are the numbers, their scales,
        and the result.
        """
        stored, scales, target = addresses
        name = f"convert_{types[0].name}_to_{types[1].name}"
        blocks = rows if scales else -(-rows * inner // THREADS)
        self._launch(stream, name, blocks, stored, scales, target, np.int64(rows), np.int64(inner))

    def quantise(
        self, stream: Any, dtype: np.dtype[Any], addresses: tuple[int, int, int, int], rows: int, inner: int
    ) -> None:
        """[rows, inner] numbers to E4M3 with a scale per row. `addresses` are those of the stored
        numbers, their scales, the result, and its scales.
        """
        self._launch(stream, f"quantise_{dtype.name}", rows, *addresses, np.int64(rows), np.int64(inner))

    def _launch(self, stream: Any, name: str, blocks: int, *arguments: Any) -> None:
        self._module.launch(stream, name, max(1, min(blocks, MOST_BLOCKS)), THREADS, *arguments)
