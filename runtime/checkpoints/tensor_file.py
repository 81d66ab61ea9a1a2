"""A safetensors file, memory-mapped: names, shapes and types from the header, values as views into the map.

Written here and not taken from the safetensors package because uploads must read straight from the map, and
because a header can then be checked (truncated, foreign, overlapping) before a single page of weights is
touched. The index of a sharded checkpoint (`*.safetensors.index.json`) opens as if it were one file.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.runtime.executors import Array

DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Entry:
    """One stored tensor: where its bytes are and how to read them."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    stop: int


class TensorFile(Mapping[str, Entry]):
    """Header entries by name; `read` maps the values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for file in _shards(path) if path.name.endswith(".index.json") else [path]:
            self._add(file)
        self._maps: dict[Path, NDArray[np.uint8]] = {}

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, name: str) -> Array:
        """The stored values, uncopied and read-only, in their stored type."""
        entry = self.entries[name]
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, mode="r")
        raw = self._maps[entry.file][entry.start : entry.stop]
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def _add(self, file: Path) -> None:
        header, data_start, size = _header(file)
        self.metadata |= header.pop("__metadata__", {})
        for name, described in header.items():
            start, stop = (data_start + offset for offset in described["data_offsets"])
            entry = Entry(file, described["dtype"], tuple(described["shape"]), start, stop)
            if stop > size or stop < start:
                raise WeightsError(
                    f"{file} is truncated: {name} should end at byte {stop}, the file has {size}.",
                    "Download or copy the file again.",
                )
            if entry.dtype in DTYPES:
                want = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
                if want != stop - start:
                    raise WeightsError(
                        f"{file} is damaged: {name} has {stop - start} bytes where its shape needs {want}.",
                        "Download or copy the file again.",
                    )
            self.entries[name] = entry


def _header(file: Path) -> tuple[dict[str, dict], int, int]:  # type: ignore[type-arg]
    """The JSON header, the byte where the data starts, the size of the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("header longer than the file")
            header = json.loads(f.read(length))
        if not isinstance(header, dict):
            raise ValueError("header is not an object")
    except OSError as error:
        raise WeightsError(
            f"{file} cannot be read ({error.strerror}).", "Check the path and its rights."
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"{file} is not a safetensors file, or it is truncated.",
            "Download or copy the file again; .pth and .ckpt files must be converted to safetensors first.",
        ) from error
    return header, 8 + length, size


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{index} is not an index of a sharded checkpoint.", "Download it again."
        ) from error
    return [index.parent / name for name in sorted(set(names))]
