"""A safetensors file, memory-mapped: names, shapes and types from the header, values as views into the map.

Written here and not taken from the safetensors package because uploads must read straight from the map, and
because a header can then be checked (truncated, foreign, overlapping) before a single page of weights is
touched. The index of a sharded checkpoint (`*.safetensors.index.json`) opens as if it were one file, and so
does each shard (`…-00001-of-00004.safetensors`), with or without an index.

All faults are WeightsErrors that name the file.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.runtime.executors import Array

INDEX = ".safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors package
LARGEST = 1 << 53  # bytes or elements. Products of longer numbers take minutes
MOST_DIMENSIONS = 32
CHECKED_AT_ONCE = 1 << 22  # numbers
LONGEST_NAME = 200  # characters of a shard's file name
MOST_NAMED = 5  # shards in a message
METADATA = "__metadata__"
SUFFIXES = (".safetensors", ".sft")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|sft)", re.IGNORECASE)
MOST_SHARDS = 1000

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


# By type: the bits of exponent and mantissa of the smallest one that is no finite number.
_NOT_FINITE = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
_LIMITS = {DTYPES[name]: limit for name, limit in _NOT_FINITE.items()}


@dataclass(frozen=True)
class Entry:
    """One stored tensor: where its bytes are and how to read them."""

    file: Path
    dtype: str  # as the file says: possibly one that is not in DTYPES
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    stop: int


class TensorFile(Mapping[str, Entry]):
    """Header entries by name; `read` maps the values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, object] = {}
        for file in _files(path):
            header, data_start, size = _header(file)
            self.metadata |= _metadata(file, header.pop(METADATA, {}))
            entries = _entries(file, header, data_start)
            _check_layout(file, entries, data_start, size)
            self.entries |= entries
        self._maps: dict[Path, NDArray[np.uint8]] = {}

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, name: str) -> Array:
        """The stored values, uncopied and read-only, in their stored type, which must be one of DTYPES."""
        entry = self.entries[name]
        if entry.file not in self._maps:
            # asarray: results of an np.memmap would be np.memmaps too
            self._maps[entry.file] = np.asarray(np.memmap(entry.file, np.uint8, mode="r"))
        raw = self._maps[entry.file][entry.start : entry.stop]
        if len(raw) < entry.stop - entry.start:
            raise _damaged(entry.file, "it became shorter after it was opened")
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def header_text(path: Path) -> bytes:
    """The JSON that names the tensors of a file or an index, unparsed. Raises WeightsError."""
    if path.name.endswith(INDEX):
        return _read(path)
    return _header_text(path)[0]


def read_index(index: Path) -> dict[str, Path]:
    """The shard of every tensor."""
    try:
        described = json.loads(_read(index))
    except (ValueError, RecursionError):
        described = None
    match described:
        case {"weight_map": dict(shards)} if all(
            isinstance(name, str) and len(name) < LONGEST_NAME for name in shards.values()
        ):
            return {tensor: index.parent / name for tensor, name in shards.items()}
    raise WeightsError(f"{index} is not the index of a sharded checkpoint.", "Download it again.")


def shards_of(path: Path) -> list[Path]:
    """All shards of the set that a file belongs to by its name; none for a whole file."""
    match = SHARD.fullmatch(path.name)
    if match is None or not 1 < int(match[3]) <= MOST_SHARDS:
        return []
    stem, count, suffix = match[1], match[3], match[4]
    return [path.with_name(f"{stem}-{k:05}-of-{count}.{suffix}") for k in range(1, int(count) + 1)]


def _files(path: Path) -> list[Path]:
    """The file itself, or the shards of its set or of an index."""
    if path.name.endswith(INDEX):
        shards = sorted(set(read_index(path).values()))
        says = "lists shards that are not beside it"
    else:
        shards = shards_of(path)
        says = f"is one of {len(shards)} shards, and some are not beside it"
    missing = [shard.name for shard in shards if not os.path.isfile(shard)]  # no OSError for a bad name
    if missing:
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        raise WeightsError(
            f"{path} {says}: {', '.join(missing[:MOST_NAMED])}{more}.",
            "Download or copy these files too.",
        )
    return shards or [path]


def is_finite(values: Array) -> bool:
    """By the bits: three times as fast as numpy's isfinite, which has to convert most of the types."""
    if values.dtype not in _LIMITS:
        return bool(np.isfinite(values).all())
    itemsize = values.dtype.itemsize
    bits = np.ascontiguousarray(values).reshape(-1).view(f"u{itemsize}")
    mask = bits.dtype.type((1 << (8 * itemsize - 1)) - 1)
    parts = (bits[first : first + CHECKED_AT_ONCE] for first in range(0, bits.size, CHECKED_AT_ONCE))
    return all(int((part & mask).max()) < _LIMITS[values.dtype] for part in parts)


def require_plain(path: Path) -> None:
    """Raises WeightsError for a pipe, a socket or a device: reading it may never end."""
    with suppress(OSError):  # told by whoever opens it
        if stat.S_IFMT(mode := path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise WeightsError(f"{path} is no plain file ({stat.filemode(mode)}).", "Name a file on a disk.")


def _read(path: Path) -> bytes:
    require_plain(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _header_text(file: Path) -> tuple[bytes, int]:
    """The JSON header as text, and the size of the file."""
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise _foreign(file)
            return f.read(length), size
    except OSError as error:
        raise _unreadable(file, error) from error


def _header(file: Path) -> tuple[dict[str, object], int, int]:
    """The JSON header, the byte where the data starts, the size of the file."""
    text, size = _header_text(file)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _foreign(file) from error
    if not isinstance(header, dict):
        raise _foreign(file)
    return header, 8 + len(text), size


def _foreign(file: Path) -> WeightsError:
    return WeightsError(
        f"{file} is not a safetensors, GGUF or torch file, or it is truncated.", "Download or copy it again."
    )


def _metadata(file: Path, described: object) -> dict[str, object]:
    if not isinstance(described, dict):
        raise _damaged(file, f"its {METADATA} is not an object")
    return described


def _entries(file: Path, header: Mapping[str, object], data_start: int) -> dict[str, Entry]:
    entries = {}
    for name, described in header.items():
        match described:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
                len(shape) <= MOST_DIMENSIONS and 0 <= start <= stop < LARGEST
            ) and all(isinstance(size, int) and 0 <= size < LARGEST for size in shape):
                entry = Entry(file, dtype, tuple(shape), data_start + start, data_start + stop)
            case _:
                raise _damaged(file, f"{name[:LONGEST_NAME]} has no proper type, shape and place")
        if dtype in DTYPES and (want := math.prod(shape) * DTYPES[dtype].itemsize) != stop - start:
            raise _damaged(
                file, f"{name[:LONGEST_NAME]} has {stop - start} bytes where its shape needs {want}"
            )
        entries[name] = entry
    return entries


def _check_layout(file: Path, entries: Mapping[str, Entry], data_start: int, size: int) -> None:
    """The tensors follow each other without gaps and fill the file, as the format demands."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if not position == entry.start <= entry.stop:
            raise _damaged(file, f"{name[:LONGEST_NAME]} does not begin where the tensor before it ends")
        position = entry.stop
    if position > size:
        raise WeightsError(
            f"{file} is truncated: its tensors end at byte {position}, the file at {size}.",
            "Download or copy the file again.",
        )
    if position < size:
        raise _damaged(file, f"its tensors end at byte {position}, the file at {size}")


def _damaged(file: Path, fault: str) -> WeightsError:
    return WeightsError(f"{file} is damaged: {fault}.", "Download or copy the file again.")


def _unreadable(file: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{file} cannot be read ({error.strerror}).", "Check the path and its rights.")
