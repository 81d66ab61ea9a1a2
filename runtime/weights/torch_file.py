"""Reads the tensors of a `.pt`, `.pth` or `.ckpt` file without torch.

Such a file is a zip of a pickle and raw storages. The unpickler accepts tensors and dictionaries only: the
file can name no other function, so it cannot run code. Nothing is compressed in it, as torch writes it: no
entry takes more memory than it takes on the disk, and `TorchFile` maps the storages where they lie, so that a
checkpoint of 11 GB needs no converted copy.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.tensor_file import DTYPES, Entry

STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
}
ENTRY_TYPES = {dtype: name for name, dtype in DTYPES.items()}
MAGIC = b"PK\x03\x04"
OLD_MAGIC = (
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the number with which torch began its files before 1.6
)
WRAPPERS = ("model", "state_dict", "module")  # keys under which training code puts the tensors
LOCAL_HEADER = 30  # bytes in front of an entry's name in a zip
MAX_PICKLE = 16 << 20  # bytes; the largest model's takes 0.2 MB
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")  # they give an object a number
LARGEST, MOST_DIMENSIONS = 1 << 53, 32  # elements of a tensor
AGAIN = "Download or copy the file again, or use its safetensors."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a `.pt` file: a strided window into one storage of the archive."""

    path: Path
    entry: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """Numbers from the first one of the tensor to its last one in the storage."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def window(self, values: NDArray[Any]) -> NDArray[Any]:
        """The tensor in the storage's `values` from its first number on."""
        strides = tuple(step * self.dtype.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)

    def read(self) -> NDArray[Any]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                raw = np.frombuffer(_entry(archive, self.entry), self.dtype)[self.offset :]
        except Exception as error:  # a damaged archive can raise any exception
            raise WeightsError(f"{self.path} is damaged: {error}.", "Download it again.") from error
        if self.numbers > len(raw):
            raise WeightsError(f"{self.path} is damaged: {self.entry} is too short.", "Download it again.")
        return self.window(raw)


class _Unpickler(pickle.Unpickler):
    """Loads dictionaries of tensors and refuses all other objects."""

    def __init__(self, path: Path, folder: str, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.path, self.folder = path, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _without_gradient
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), str(), int()):
                return f"{self.folder}data/{key}", dtype
        raise pickle.UnpicklingError("it has a storage of an unknown kind")

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        match storage, offset, shape, stride:
            case (str(entry), np.dtype() as dtype), int(), tuple(), tuple() if len(shape) == len(
                stride
            ) <= MOST_DIMENSIONS and all(
                isinstance(number, int) and 0 <= number < LARGEST for number in (offset, *shape, *stride)
            ):
                return StoredTensor(self.path, entry, dtype, offset, shape, stride)
        raise pickle.UnpicklingError("it has a tensor of an unknown kind")


def _without_gradient(tensor: Any, *_: Any) -> Any:
    return tensor


def _entry(archive: zipfile.ZipFile, name: str, most: int | None = None) -> bytes:
    """The bytes of an entry that is not compressed, and has `most` bytes at most."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which torch does not do")
    if most is not None and entry.file_size > most:
        raise ValueError(f"{name} has {entry.file_size} bytes, more than {most}")
    return archive.read(entry)


def _require_modest(pickled: bytes) -> None:
    """Raises ValueError for a pickle that would take more memory than its size: by a length that it does not
    have, or by the number of an object, which decides the length of the unpickler's table.
    """
    for operation, argument, _ in pickletools.genops(pickled):  # checks the lengths
        if operation.name in PUTS and int(argument or 0) > len(pickled):
            raise ValueError(f"its pickle has {argument} objects in {len(pickled)} bytes")


def _reason(error: Exception) -> str:
    return "it is no zip archive" if isinstance(error, zipfile.BadZipFile) else str(error) or repr(error)


def read_torch_file(
    path: Path, what: str = "file of torch's tensors", use: str = AGAIN
) -> dict[str, StoredTensor]:
    """The tensors of a file, which may lie under a key of WRAPPERS.

    Raises WeightsError: `path` is no `what`, with the hint `use`.
    """
    try:
        data, folder = _pickled(path)
        _require_modest(data)
        loaded = _Unpickler(path, folder, data).load()
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}).", "Check the path and its rights."
        ) from error
    except Exception as error:  # a damaged pickle can raise any exception
        message = f"{path} is no {what}, or damaged: {_reason(error)}."
        raise WeightsError(message, use) from error
    tensors = loaded
    if isinstance(loaded, dict):
        tensors = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)), loaded)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, StoredTensor) for name, tensor in tensors.items()
    ):
        raise WeightsError(f"{path} is no {what}: it is no dictionary of tensors.", use)
    return dict(tensors)


def pickled_names(path: Path) -> bytes:
    """The pickle of a file, which has the names of its tensors as plain text. Nothing is unpickled."""
    try:
        return _pickled(path)[0]
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}).", "Check the path and its rights."
        ) from error
    except Exception as error:  # a damaged archive can raise any exception
        raise WeightsError(f"{path} is damaged: {_reason(error)}.", AGAIN) from error


def _pickled(path: Path) -> tuple[bytes, str]:
    """The pickle and the folder of the archive that it lies in."""
    with path.open("rb") as file:
        if file.read(len(OLD_MAGIC)) == OLD_MAGIC:
            raise pickle.UnpicklingError(
                "it has torch's format of before version 1.6; save it again with torch"
            )
    with zipfile.ZipFile(path) as archive:
        entry = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
        if entry is None:
            raise pickle.UnpicklingError("it is a zip archive without torch's data.pkl")
        return _entry(archive, entry, MAX_PICKLE), entry.removesuffix("data.pkl")


class TorchFile(Mapping[str, Entry]):
    """A `.pth` with the interface of a TensorFile: header entries by name; `read` maps the values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, object] = {}
        self._tensors = read_torch_file(path)
        starts = _storages(path)
        self.entries: dict[str, Entry] = {}
        for name, tensor in self._tensors.items():
            start, stop = starts.get(tensor.entry, (0, -1))
            first = start + tensor.offset * tensor.dtype.itemsize
            last = first + tensor.numbers * tensor.dtype.itemsize
            if last > stop:
                raise WeightsError(f"{path} is damaged: the values of {name[:80]} are missing.", AGAIN)
            self.entries[name] = Entry(path, ENTRY_TYPES[tensor.dtype], tensor.shape, first, last)
        self._map: NDArray[np.uint8] | None = None

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, name: str) -> NDArray[Any]:
        """The stored values, uncopied and read-only. Those of a transposed tensor are not contiguous."""
        entry, tensor = self.entries[name], self._tensors[name]
        if self._map is None:
            self._map = np.asarray(np.memmap(self.path, np.uint8, mode="r"))
        raw = self._map[entry.start : entry.stop]
        if len(raw) < entry.stop - entry.start:
            raise WeightsError(f"{self.path} became shorter after it was opened.", AGAIN)
        return tensor.window(raw.view(tensor.dtype))


def _storages(path: Path) -> dict[str, tuple[int, int]]:
    """By entry of the archive its first byte in the file and the byte behind it. Raises WeightsError."""
    starts = {}
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{entry.filename} is compressed, which torch does not do")
                file.seek(entry.header_offset)
                local = file.read(LOCAL_HEADER)
                start = entry.header_offset + LOCAL_HEADER
                start += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                stop = start + entry.file_size
                if stop > size:
                    raise ValueError(f"{entry.filename} ends at byte {stop}, the file at {size}")
                starts[entry.filename] = start, stop
            order = next((name for name in starts if name.endswith("byteorder")), None)
            if order is not None and archive.read(order).strip() != b"little":
                raise ValueError("its numbers are big-endian")
    except Exception as error:  # a damaged archive can raise any exception
        raise WeightsError(f"{path} is damaged: {_reason(error)}.", AGAIN) from error
    return starts
