"""Checkpoint files to canonical float32 tensors: names, scales and types as people have them, checked before
use.

Everything wrong with a file is found from the header and the scales alone and told at once. Values are
converted to float32 when asked for, one tensor at a time.

Scaled FP8 (model_spec.md 5.2): an FP8 tensor is multiplied by `<layer>.scale_weight` (also called
`weight_scale`), one number for the tensor or one per output channel; a tensor of another type is used as it
is. A file that has scales must have one for every FP8 tensor; a file without any holds plain FP8 values.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL, PARTS, required_tensors
from trt_wan.engines.config import MODELS, ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.find_files import find_files, option, spoken
from trt_wan.runtime.weights.names import canonical
from trt_wan.runtime.weights.stored import FP8_TYPES, Stored
from trt_wan.runtime.weights.tensor_file import TensorFile

FLOAT_TYPES = ("F32", "F16", "BF16", *FP8_TYPES)
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
SCALED_MARKER = "scaled_fp8"
PATCH_EMBEDDING = "patch_embedding.weight"
MOST_NAMED = 3  # files in a message


class Checkpoint(Mapping[str, NDArray[np.float32]]):
    """The `Tensors` of one file. Values are read when a tensor is asked for."""

    def __init__(self, path: Path) -> None:
        self.file = TensorFile(path)
        self.names = {canonical(name): name for name in self.file}
        self.scaled = any(name == SCALED_MARKER or name.endswith(SCALE_SUFFIXES) for name in self.names)

    @property
    def path(self) -> Path:
        return self.file.path

    def stored(self, name: str) -> Stored:
        """The tensor as it lies in the file; the motion encoder's ORTHONORMAL is computed."""
        if name == ORTHONORMAL:
            return Stored(orthonormal(self[DIRECTION]))
        entry = self.file[self.names[name]]
        scales = self._scales(name) if entry.dtype in FP8_TYPES else None
        return Stored(self.file.read(self.names[name]), scales, entry.file, entry.start)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.stored(name).float32()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.names or (name == ORTHONORMAL and DIRECTION in self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        """Some rows of a table; the other rows are not read."""
        return self.stored(name).rows(indices)

    def raw(self, name: str) -> NDArray[np.generic]:
        """The stored values of a tensor that is not a weight, such as an embedded tokenizer."""
        return self.file.read(self.names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file[self.names[name]].shape

    def require(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """WeightsError that names every tensor that is missing, has another shape, or cannot be read."""
        faults = [f"{name} {fault}" for name, shape in tensors.items() if (fault := self._fault(name, shape))]
        if faults:
            raise WeightsError(
                f"{self.path} does not fit: {len(faults)} of {len(tensors)} tensors are wrong: "
                f"{'; '.join(faults)}.",
                "Use the checkpoint of Wan2.2-Animate-14B in bf16, fp16 or scaled FP8.",
            )

    def _scales(self, name: str) -> NDArray[np.float32] | None:
        """The scale of every row of an FP8 tensor; None in a file without scales."""
        scale = self._scale_of(name)
        if scale is None:
            return None
        values = self.file.read(scale).astype(np.float32).reshape(-1)
        return np.broadcast_to(values, self.shape(name)[:1])

    def _scale_of(self, name: str) -> str | None:
        """The stored name of an FP8 tensor's scale."""
        layer = name.removesuffix(".weight")
        return next((self.names[s] for suffix in SCALE_SUFFIXES if (s := layer + suffix) in self.names), None)

    def _fault(self, name: str, shape: tuple[int, ...]) -> str | None:
        if name not in self.names:
            return "is missing"
        entry = self.file[self.names[name]]
        if entry.dtype not in FLOAT_TYPES:
            return f"has the type {entry.dtype}{self._quantisation(name)}, which is not supported"
        if entry.shape != shape:
            return f"is {list(entry.shape)} instead of {list(shape)}"
        return self._scale_fault(name, shape) if entry.dtype in FP8_TYPES and self.scaled else None

    def _scale_fault(self, name: str, shape: tuple[int, ...]) -> str | None:
        stored = self._scale_of(name)
        if stored is None:
            return "is FP8 and has no scale"
        scale, per_channel = self.file[stored], (shape[:1], (*shape[:1], 1))
        if scale.dtype in FLOAT_TYPES and scale.shape in ((), (1,), (1, 1), *per_channel):
            values = self.file.read(stored).astype(np.float32)
            wrong = values[~((values > 0) & np.isfinite(values))]
            return f"has a scale of {wrong[0]:g} ({stored})" if wrong.size else None
        return (
            f"has a scale of the type {scale.dtype} and the shape {list(scale.shape)}"
            f"{self._quantisation(name)}, which is not supported"
        )

    def _quantisation(self, name: str) -> str:
        """The format of a tensor in the file's own words, for a message (model_spec.md 5.2, comfy_quant)."""
        described = self.names.get(name.removesuffix("weight") + "comfy_quant")
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            if described is not None:
                layer = json.loads(self.file.read(described).tobytes())
            else:
                layers = json.loads(str(self.file.metadata["_quantization_metadata"]))["layers"]
                layer = layers[self.names[name].removesuffix(".weight")]
            return f" ({layer['format']})"
        return ""


def orthonormal(direction: NDArray[np.float32]) -> NDArray[np.float32]:
    """Q of the Householder QR with LAPACK's signs: others silently break expressions (model_spec.md 1.6)."""
    return np.linalg.qr(direction + np.float32(1e-8))[0].astype(np.float32)


def identify(transformer: Checkpoint) -> ModelConfig:
    """The model whose width the transformer has."""
    dims = {model.transformer.dim: model for model in MODELS.values()}
    shape = transformer.shape(PATCH_EMBEDDING) if PATCH_EMBEDDING in transformer else ()
    if not shape or shape[0] not in dims:
        raise WeightsError(
            f"{transformer.path} is not a Wan2.2-Animate transformer: its {PATCH_EMBEDDING} is "
            f"{list(shape) if shape else 'missing'}.",
            f"Its first dimension must be one of {sorted(dims)}.",
        )
    return dims[shape[0]]


def load_weights(
    folders: Sequence[Path], chosen: Mapping[Part, Path]
) -> tuple[ModelConfig, dict[Part, Checkpoint]]:
    """The model and the checked checkpoint of every part: `chosen`, or found in or below `folders`.

    Several files may hold a part, since a folder of models has other CLIPs and other T5s: the one that fits
    is taken. Reads headers and scales only. Raises WeightsError.
    """
    files = {part: [path] for part, path in chosen.items()}
    files |= find_files(folders, [part for part in PARTS if part not in chosen])
    transformer = _open_one("transformer", files["transformer"], identify)
    model = identify(transformer)
    weights: dict[Part, Checkpoint] = {"transformer": transformer}
    for part in PARTS:
        if part not in weights:
            weights[part] = _open_one(part, files[part], lambda _: model)
    return model, weights


def _open_one(part: Part, paths: Sequence[Path], model: Callable[[Checkpoint], ModelConfig]) -> Checkpoint:
    """The only one of `paths`, or the only one of them that fits."""

    def opened(path: Path) -> Checkpoint:
        checkpoint = Checkpoint(path)
        checkpoint.require(required_tensors(model(checkpoint), part))
        return checkpoint

    if len(paths) == 1:
        return opened(paths[0])
    fitting = []
    for path in paths:
        with suppress(WeightsError):
            fitting.append(opened(path))
    if len(fitting) != 1:
        several = [str(checkpoint.path) for checkpoint in fitting] or list(map(str, paths))
        more = f" and {len(several) - MOST_NAMED} more" if len(several) > MOST_NAMED else ""
        names = f"{', '.join(several[:MOST_NAMED])}{more}"
        raise WeightsError(
            f"Several files hold the {spoken(part)}{'' if fitting else ', and none fits'}: {names}.",
            f"Choose with {option(part)} FILE.",
        )
    return fitting[0]
