"""One tensor as it lies in its file, and the interface through which every executor reads weights.

ONNX Runtime asks for float32, the GPU for the bytes as they are stored. A change to the weights themselves (a
LoRA) belongs behind `Tensors`, where both see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.tensor_file import DTYPES

FP8_TYPES = ("F8_E4M3", "F8_E5M2")
# The float32 value of each of the 256 codes; five times as fast as ml_dtypes' astype.
FP8_VALUES = {
    DTYPES[name]: np.arange(256, dtype=np.uint8).view(DTYPES[name]).astype(np.float32) for name in FP8_TYPES
}


@dataclass(frozen=True, eq=False)
class Stored:
    values: NDArray[Any]  # a view into the mapped file, or an array in memory; in the stored type
    scales: NDArray[np.float32] | None = None  # [rows]; the rows of an FP8 tensor are multiplied by them
    file: Path | None = None  # the bytes are here, from `start`; None for an array in memory
    start: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def row(self) -> int:
        """Numbers per row; a row is everything behind the first axis."""
        return self.values.size // self.values.shape[0] if self.values.ndim else 1

    def float32(self) -> NDArray[np.float32]:
        return _float32(self.values, self.scales)

    def rows(self, indices: Sequence[int]) -> NDArray[np.float32]:
        """Some rows of a table, in float32. The other rows are not read."""
        chosen = list(indices)
        return _float32(self.values[chosen], None if self.scales is None else self.scales[chosen])

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


def _float32(values: NDArray[Any], scales: NDArray[np.float32] | None) -> NDArray[np.float32]:
    if values.dtype not in FP8_VALUES:
        return values.astype(np.float32)
    result = FP8_VALUES[values.dtype][values.view(np.uint8)]
    if scales is not None:
        result *= scales.reshape(-1, *[1] * (result.ndim - 1))
    return result
