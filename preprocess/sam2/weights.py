"""SAM2 checkpoints: the official `.pt` files, and safetensors in fp32 or fp16 with the same names. The shapes
tell which of the eight models a file is.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.sam2.config import SAM2_MODELS, Sam2Config
from trt_wan.engines.sam2.contracts import POS_EMBED, POS_EMBED_WINDOW, POSITION, required_tensors
from trt_wan.errors import NotFinite, WeightsError
from trt_wan.preprocess.sam2.resample import bicubic_matrix
from trt_wan.runtime.finite import DAMAGED
from trt_wan.runtime.weights.stored import Stored
from trt_wan.runtime.weights.tensor_file import TensorFile
from trt_wan.runtime.weights.torch_file import read_torch_file

Values = NDArray[np.float32]

FLOATS = ("F32", "F16", "BF16", "F64")
USE = "Use an official file (sam2.1_hiera_base_plus.pt, sam2_hiera_large.pt, ...) or its safetensors."
NAMED = 6  # tensors named in a message: a foreign file has hundreds


class Sam2Weights(Mapping[str, Values]):
    """Tensors by official name, float32, read on access, and the trunk's position table."""

    def __init__(self, config: Sam2Config, stored: Mapping[str, Callable[[], NDArray[Any]]]) -> None:
        self.config, self._stored = config, stored

    def __getitem__(self, name: str) -> Values:
        if name == POSITION:
            return position_table(self[POS_EMBED], self[POS_EMBED_WINDOW], self.config.mask_size)
        values = self._stored[name]().astype(np.float32)
        if not np.isfinite(values).all():
            raise NotFinite(f"SAM2's tensor {name} holds a NaN or an infinity.", DAMAGED)
        return values

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
    """The checked weights of a file, with the model's config. Raises WeightsError."""
    if path.suffix.lower() in (".pt", ".pth"):
        tensors = read_torch_file(path, "SAM2 checkpoint", USE)
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
    """The model with exactly these tensors."""
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
    """Every tensor random, including those that start at zero in training. `object_score` decides whether the
    object is seen. They serve for numerics and speed. Masks have no meaning.
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
    """Weights already in memory."""

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


def _reader(file: TensorFile, name: str) -> Callable[[], NDArray[Any]]:
    return lambda: file.read(name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
