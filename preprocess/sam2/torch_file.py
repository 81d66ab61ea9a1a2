"""Reads the tensors of a `.pt` file without torch.

A `.pt` is a zip of a pickle and raw storages. The unpickler accepts tensors and dictionaries only: the file
can name no other function, so it cannot run code. Nothing is compressed in it, as torch writes it, so that no
entry takes more memory than it takes on the disk.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import WeightsError

STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
}
MAX_PICKLE = 16 << 20  # bytes; the largest model's takes 0.2 MB
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")  # they give an object a number
LARGEST, MOST_DIMENSIONS = 1 << 53, 32  # elements of a tensor
USE = "Use an official file (sam2.1_hiera_base_plus.pt, sam2_hiera_large.pt, ...) or its safetensors."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a `.pt` file: a strided window into one storage of the archive."""

    path: Path
    entry: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> NDArray[Any]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                raw = np.frombuffer(_entry(archive, self.entry), self.dtype)[self.offset :]
        except Exception as error:  # a damaged archive can raise any exception
            raise WeightsError(f"{self.path} is damaged: {error}.", "Download it again.") from error
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if math.prod(self.shape) and last >= len(raw):
            raise WeightsError(f"{self.path} is damaged: {self.entry} is too short.", "Download it again.")
        strides = tuple(step * self.dtype.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(raw, self.shape, strides, writeable=False)


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


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of an official file, which are under "model"."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            if entry is None:
                raise pickle.UnpicklingError("it has no data.pkl")
            data = _entry(archive, entry, MAX_PICKLE)
            _require_modest(data)
            loaded = _Unpickler(path, entry.removesuffix("data.pkl"), data).load()
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}).", "Check the path and its rights."
        ) from error
    except Exception as error:  # a damaged pickle can raise any exception
        message = f"{path} is no SAM2 checkpoint, or damaged: {_reason(error)}."
        raise WeightsError(message, USE) from error
    tensors = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, StoredTensor) for name, tensor in tensors.items()
    ):
        raise WeightsError(f"{path} is no SAM2 checkpoint: it is no dictionary of tensors.", USE)
    return dict(tensors)
