"""The kernels that turn weights as their file stores them into the types of the engines (convert.cu).

Addresses are of the device. `scales` is 0 where the stored numbers are the weights themselves. Encodings are
those of `Stored.encoding`.
"""

from typing import Any

import numpy as np

from trt_wan.runtime.device.gpu import MOST_BLOCKS, Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, read_source
from trt_wan.runtime.weights.stored import BLOCKS, ROTATIONS

SOURCES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
TARGETS = ("float32", "bfloat16", "float16")
NAMES = (
    *(f"convert_{source}_to_{target}" for source in SOURCES for target in TARGETS),
    *(f"quantise_{source}" for source in SOURCES),
    *(f"convert_{blocks}_to_float32" for blocks in BLOCKS),
    "rotate",
    "quantise_to_int8",
)
SOURCE = read_source(__package__, "gguf_blocks.cuh", "convert.cu")


class Converter:
    def __init__(self, gpu: Gpu) -> None:
        self._module = Module(gpu.device, SOURCE, NAMES)

    def convert(
        self,
        stream: Any,
        encodings: tuple[str, str],
        addresses: tuple[int, int, int],
        rows: int,
        inner: int,
    ) -> None:
        """[rows, inner] numbers from the first encoding to the second: SOURCES to TARGETS, or BLOCKS to
        float32. `addresses` are the numbers, their scales, and the result.
        """
        stored, scales, target = addresses
        name = "convert_{}_to_{}".format(*encodings)
        blocks = rows if scales else -(-rows * inner // THREADS)
        self._launch(stream, name, blocks, stored, scales, target, np.int64(rows), np.int64(inner))

    def quantise(
        self, stream: Any, encoding: str, addresses: tuple[int, int, int, int], rows: int, inner: int
    ) -> None:
        """[rows, inner] numbers of SOURCES to E4M3 with a scale per row. `addresses` are those of the stored
        numbers, their scales, the result, and its scales.
        """
        self._launch(stream, f"quantise_{encoding}", rows, *addresses, np.int64(rows), np.int64(inner))

    def quantise_int8(
        self, stream: Any, values: int, target: int, scales: int, rows: int, inner: int
    ) -> None:
        """float32 [rows, inner] to int8 with a scale per row. Addresses of the device."""
        sizes = np.int64(rows), np.int64(inner)
        self._launch(stream, "quantise_to_int8", rows, values, target, scales, *sizes)

    def rotate(self, stream: Any, values: int, numbers: int, group: int) -> None:
        """Rotates float32 numbers in place, as stored.py does; `numbers` is a multiple of `group`."""
        assert group in ROTATIONS
        blocks = -(-numbers // max(ROTATIONS))
        self._launch(stream, "rotate", blocks, values, np.int64(numbers), np.int64(group))

    def _launch(self, stream: Any, name: str, blocks: int, *arguments: Any) -> None:
        self._module.launch(stream, name, max(1, min(blocks, MOST_BLOCKS)), THREADS, *arguments)
