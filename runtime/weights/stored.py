"""One tensor as it lies in its file, and the interface through which every executor reads weights.

ONNX Runtime asks for float32, the GPU for the bytes as they are stored. A weight is decoded in this order:
the stored numbers, or those in GGUF blocks; times the scales of their rows; rotated; plus a delta (a LoRA).
On the CPU numpy does it, one chunk of rows at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.int8 import rotated
from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.tensor_file import DTYPES

FP8_TYPES = ("F8_E4M3", "F8_E5M2")
# The float32 value of each of the 256 codes; five times as fast as ml_dtypes' astype.
FP8_VALUES = {
    DTYPES[name]: np.arange(256, dtype=np.uint8).view(DTYPES[name]).astype(np.float32) for name in FP8_TYPES
}
# GGUF types whose numbers lie in blocks: numbers and bytes per block.
BLOCKS = {
    "Q8_0": (32, 34),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
ROTATIONS = (4, 16, 64, 256, 1024)  # input columns per group; powers of 4
CHUNK = 1 << 18  # numbers that are decoded at a time: they stay in the cache of a core


class Delta(Protocol):
    """A change to a weight, such as a LoRA."""

    def add(self, values: NDArray[np.float32], first: int) -> None:
        """Adds the change of the rows from `first` to `values` [rows, ...], in place."""
        ...


@dataclass(frozen=True, eq=False)
class Stored:
    """`values` is a view into the mapped file or an array in memory, in the stored type. With `blocks` it is
    uint8 [rows, bytes per row].
    """

    values: NDArray[Any]
    scales: NDArray[np.float32] | None = None  # [rows]; the rows of FP8 and int8 are multiplied by them
    file: Path | None = None  # the bytes are here, from `start`; None for an array in memory
    start: int = 0
    rotation: int = 0  # one of ROTATIONS; 0: the input columns are not rotated (files_and_loras.md 7)
    blocks: str = ""  # one of BLOCKS
    dims: tuple[int, ...] = ()  # the tensor's shape where `values` has another
    delta: Delta | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def encoding(self) -> str:
        """The GGUF type, or numpy's name of the type."""
        return self.blocks or self.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dims or self.values.shape

    @property
    def row(self) -> int:
        """Numbers per row; a row is everything behind the first axis."""
        return math.prod(self.shape[1:])

    def nbytes(self, numbers: int) -> int:
        """Bytes that so many numbers take in the file; whole blocks of them."""
        count, size = BLOCKS.get(self.blocks, (1, self.dtype.itemsize))
        return numbers // count * size

    def float32(self) -> NDArray[np.float32]:
        if not self.shape:
            return self.values.astype(np.float32)
        rows = self.shape[0]
        result = np.empty(self.shape, np.float32)
        step = max(1, CHUNK // max(1, self.row))
        for first in range(0, rows, step):
            part = slice(first, first + step)
            result[part] = self._decoded(part)
            if self.delta is not None:
                self.delta.add(result[part], first)
        return result

    def rows(self, indices: Sequence[int]) -> NDArray[np.float32]:
        """Some rows of a table, in float32. The other rows are not read."""
        chosen = list(indices)
        result = self._decoded(chosen)
        if self.delta is not None:
            for i, index in enumerate(chosen):
                self.delta.add(result[i : i + 1], index)
        return result

    def _decoded(self, chosen: "slice | list[int]") -> NDArray[np.float32]:
        """Some rows before the delta."""
        values = (self.values if self.blocks else self.values.reshape(self.shape))[chosen]
        if self.blocks:
            result = _dequantizer(self.blocks)(values)
        elif self.dtype in FP8_VALUES:
            result = FP8_VALUES[self.dtype][values.view(np.uint8)]
        else:
            result = values.astype(np.float32)
        result = result.reshape(len(values), *self.shape[1:])
        if self.scales is not None:
            result *= self.scales[chosen].reshape(-1, *[1] * (result.ndim - 1))
        return rotated(result, self.rotation) if self.rotation else result

    def read(self, start: int, into: NDArray[np.uint8]) -> None:
        """Fills `into` with the tensor's bytes from `start`, by plain reads. Any thread may call it."""
        if self.file is None:
            flat = np.ascontiguousarray(self.values).reshape(-1).view(np.uint8)
            into[:] = flat[start : start + len(into)]
            return
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.start + start)
                target, done = into.data, 0
                while done < len(into):
                    count = file.readinto(target[done:])
                    if not count:
                        raise WeightsError(
                            f"{self.file} became shorter while it was read.",
                            "Download or copy the file again.",
                        )
                    done += count
        except OSError as error:
            raise WeightsError(
                f"{self.file} cannot be read ({error.strerror}).", "Check the disk, then run again."
            ) from error


class Tensors(Protocol):
    """The tensors of one part of the model, by canonical name."""

    def stored(self, name: str) -> Stored:
        """The tensor as it lies in its file."""
        ...

    def __getitem__(self, name: str) -> NDArray[np.float32]: ...

    def rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        """Some rows of a table in float32."""
        ...


@cache
def _dequantizer(blocks: str) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Rows of a GGUF type to rows of float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[blocks]

    def decode(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        with np.errstate(invalid="ignore", over="ignore"):  # the scale of a damaged block may be Inf
            return dequantize(np.ascontiguousarray(rows), kind)

    return decode
