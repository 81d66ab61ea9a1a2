"""The kernels that add LoRAs to float32 weights on the device (merge.cu). Addresses are of the device."""

from typing import Any

import numpy as np

from trt_wan.runtime.device.gpu import MOST_BLOCKS, Gpu
from trt_wan.runtime.device.kernels import THREADS, Module, read_source

TYPES = ("float32", "float16", "bfloat16")
NAMES = (*(f"{kernel}_{name}" for kernel in ("add_product", "add") for name in TYPES), "quantise_rows")
TILE = 64  # as in merge.cu
SOURCE = read_source(__package__, "merge.cu")


class Merger:
    def __init__(self, gpu: Gpu) -> None:
        self._module = Module(gpu.device, SOURCE, NAMES)

    def add_product(
        self,
        stream: Any,
        dtype: np.dtype[Any],
        addresses: tuple[int, int, int],
        scale: float,
        sizes: tuple[int, int, int],
    ) -> None:
        """values += scale * up @ down. `addresses` are those of up [rows, rank], down [rank, inner] and
        values [rows, inner]; `sizes` are rows, inner and rank.
        """
        up, down, values = addresses
        rows, inner, rank = sizes
        tiles = -(-rows // TILE) * -(-inner // TILE)
        numbers = (np.int64(n) for n in (rows, inner, rank))
        arguments = up, down, np.float32(scale), values, *numbers
        self._module.launch(stream, f"add_product_{dtype.name}", min(tiles, MOST_BLOCKS), THREADS, *arguments)

    def add(self, stream: Any, dtype: np.dtype[Any], change: int, scale: float, values: int, n: int) -> None:
        """values += scale * change, n numbers each."""
        blocks = max(1, min(-(-n // THREADS), MOST_BLOCKS))
        arguments = change, np.float32(scale), values, np.int64(n)
        self._module.launch(stream, f"add_{dtype.name}", blocks, THREADS, *arguments)

    def quantise_rows(
        self, stream: Any, values: int, target: int, scales: int, rows: int, inner: int
    ) -> None:
        """float32 [rows, inner] to E4M3 with a scale per row (engines/fp8.py)."""
        sizes = np.int64(rows), np.int64(inner)
        blocks = min(rows, MOST_BLOCKS)
        self._module.launch(stream, "quantise_rows", blocks, THREADS, values, target, scales, *sizes)
