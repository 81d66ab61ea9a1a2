"""SAM2 checkpoints as people have them: the official `.pt`, and safetensors in fp32 or fp16, with the same
names. Which of the eight models a file is, its shapes tell.

A `.pt` is a zip of a pickle and raw storages. It is read here without torch, by an unpickler that knows
tensors, dictionaries and nothing else: a file can name no other function, so it can run none.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.sam2.config import SAM2_MODELS, Sam2Config
from trt_wan.engines.sam2.contracts import POS_EMBED, POS_EMBED_WINDOW, POSITION, required_tensors
from trt_wan.errors import WeightsError
from trt_wan.preprocess.sam2.resample import bicubic_matrix
from trt_wan.runtime.weights.stored import Stored
from trt_wan.runtime.weights.tensor_file import TensorFile

Values = NDArray[np.float32]

STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
}
FLOATS = ("F32", "F16", "BF16", "F64")
USE = "Use an official file (sam2.1_hiera_base_plus.pt, sam2_hiera_large.pt, ...) or its safetensors."
NAMED = 6  # tensors named in a message; a foreign file has hundreds


class Sam2Weights(Mapping[str, Values]):
    """Tensors by official name, float32, read when asked for; and the trunk's position table."""

    def __init__(self, config: Sam2Config, stored: Mapping[str, Callable[[], NDArray[Any]]]) -> None:
        self.config, self._stored = config, stored

    def __getitem__(self, name: str) -> Values:
        if name == POSITION:
            return position_table(self[POS_EMBED], self[POS_EMBED_WINDOW], self.config.mask_size)
        return self._stored[name]().astype(np.float32)

    def stored(self, name: str) -> Stored:
        """The tensor for the GPU."""
        return Stored(self[name])

    def rows(self, name: str, indices: Sequence[int]) -> Values:
        return self.stored(name).rows(indices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def load_sam2(path: Path) -> Sam2Weights:
    """The checked weights of a file, and in them which model it is. WeightsError."""
    if path.suffix.lower() in (".pt", ".pth"):
        tensors = _read_pt(path)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        stored: dict[str, Callable[[], NDArray[Any]]] = {n: t.read for n, t in tensors.items()}
    else:
        file = TensorFile(path)
        if foreign := [name for name in file if file[name].dtype not in FLOATS]:
            raise WeightsError(f"{path} has tensors of types that are not supported: {_some(foreign)}.", USE)
        shapes = {name: file[name].shape for name in file}
        stored = {name: _reader(file, name) for name in file}
    return Sam2Weights(identify(path, shapes), stored)


def identify(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Sam2Config:
    """The model whose tensors these are, all of them and no others."""
    trunk = "image_encoder.trunk."
    width = shapes.get(POS_EMBED, (0, 0))[1:2]
    blocks = sum(name.startswith(f"{trunk}blocks.") and name.endswith("norm1.weight") for name in shapes)
    version = "2.1" if any(name.startswith(("no_obj_embed", "obj_ptr_tpos")) for name in shapes) else "2.0"
    found = [
        model
        for model in SAM2_MODELS.values()
        if (model.dim,) == width and sum(model.blocks) == blocks and model.version == version
    ]
    if not found:
        raise WeightsError(
            f"{path} is no SAM2 checkpoint: no model has {blocks} blocks that begin with "
            f"{width[0] if width and width[0] else 'no'} channels.",
            USE,
        )
    required = required_tensors(found[0])
    faults = {
        "missing": [name for name in required if name not in shapes],
        "unexpected": [name for name in shapes if name not in required],
        "of a wrong shape": [n for n, shape in required.items() if n in shapes and shapes[n] != shape],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names)
        raise WeightsError(f"{path} looks like {found[0].name}, but its tensors are not: {told}.", USE)
    return found[0]


def random_sam2_weights(config: Sam2Config, seed: int, object_score: float = 3.0) -> dict[str, Values]:
    """Every tensor random, also those that training starts at zero; `object_score` decides whether the
    object is seen. Numerics and speed can be shown with them, masks cannot.
    """
    rng = np.random.default_rng(seed)
    made: dict[str, Values] = {}
    for name, shape in required_tensors(config).items():
        last = name.rsplit(".", 1)[-1]
        mean, deviation = 0.0, 1 / math.sqrt(max(1, math.prod(shape[1:])))
        if last == "gamma":
            mean, deviation = 0.5, 0.1
        elif last == "weight" and len(shape) == 1:
            mean, deviation = 1.0, 0.1
        elif last == "bias":
            deviation = 0.1
        elif "embed" in last or "embed" in name or "token" in name or last.startswith(("no_", "mask", "pos")):
            deviation = 1.0 if "gaussian" in name else 0.3
        if name.startswith("sam_mask_decoder.output_upscaling") and len(shape) == 4:
            deviation = 1 / math.sqrt(shape[0])
        if "hypernetworks" in name and name.endswith("layers.2.weight"):
            deviation /= 4  # masks of a few units, as trained ones
        if name == "sam_mask_decoder.pred_obj_score_head.layers.2.bias":
            mean = object_score
        made[name] = (mean + deviation * rng.standard_normal(shape)).astype(np.float32)
    return made


def weights_of(config: Sam2Config, tensors: Mapping[str, Values]) -> Sam2Weights:
    """Weights that are in memory already."""

    def reader(name: str) -> Callable[[], Values]:
        return lambda: tensors[name]

    return Sam2Weights(config, {name: reader(name) for name in tensors})


def position_table(background: Values, window: Values, size: int) -> Values:
    """[size, size, channels]: the background enlarged by bicubic interpolation, the window repeated."""
    rows = bicubic_matrix(background.shape[2], size)
    columns = bicubic_matrix(background.shape[3], size)
    enlarged = np.einsum("yh,chw,xw->yxc", rows, background[0].astype(np.float64), columns, optimize=True)
    repeats = size // window.shape[2]
    table = enlarged + np.tile(window[0].transpose(1, 2, 0), (repeats, repeats, 1))
    return np.ascontiguousarray(table, np.float32)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a `.pt`: a strided window into one storage of the archive."""

    path: Path
    entry: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> NDArray[Any]:
        with zipfile.ZipFile(self.path) as archive:
            raw = np.frombuffer(archive.read(self.entry), self.dtype)[self.offset :]
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if math.prod(self.shape) and (last >= len(raw) or min(self.stride, default=0) < 0):
            raise WeightsError(f"{self.path} is damaged: {self.entry} is too short.", "Download it again.")
        strides = tuple(step * self.dtype.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(raw, self.shape, strides, writeable=False)


class _Unpickler(pickle.Unpickler):
    """Dictionaries of tensors; anything else that a pickle can ask for is refused."""

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

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Stored:
        match storage, offset, shape, stride:
            case (str(entry), np.dtype() as dtype), int(), tuple(), tuple() if all(
                isinstance(number, int) for number in (*shape, *stride)
            ):
                return _Stored(self.path, entry, dtype, offset, shape, stride)
        raise pickle.UnpicklingError("it has a tensor of an unknown kind")


def _without_gradient(tensor: Any, *_: Any) -> Any:
    return tensor


def _read_pt(path: Path) -> dict[str, _Stored]:
    """The tensors of an official file, which has them under "model"."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            if entry is None:
                raise pickle.UnpicklingError("it has no data.pkl")
            loaded = _Unpickler(path, entry.removesuffix("data.pkl"), archive.read(entry)).load()
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}).", "Check the path and its rights."
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to do
        reason = "it is no zip archive" if isinstance(error, zipfile.BadZipFile) else str(error)
        raise WeightsError(f"{path} is no SAM2 checkpoint, or damaged: {reason}.", USE) from error
    tensors = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, _Stored) for name, tensor in tensors.items()
    ):
        raise WeightsError(f"{path} is no SAM2 checkpoint: it is no dictionary of tensors.", USE)
    return dict(tensors)


def _reader(file: TensorFile, name: str) -> Callable[[], NDArray[Any]]:
    return lambda: file.read(name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
