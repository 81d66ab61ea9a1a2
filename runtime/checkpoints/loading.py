"""Checkpoint files to canonical float tensors: names, scales and types as people have them, checked before
use.

A part's file is recognised by what is in it, not by its name. Everything wrong with it is found from the
header alone and told at once. Values are converted to float32 when asked for, one tensor at a time.

Scaled FP8 (model_spec.md 5.2): an FP8 tensor is multiplied by `<layer>.scale_weight` (also called
`weight_scale`); a tensor of another type is used as it is. A file that has scales must have one for every FP8
tensor; a file without any holds plain FP8 values.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL, TOKEN_EMBEDDING, required_tensors
from trt_wan.engines.config import MODELS, ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.errors import WeightsError
from trt_wan.runtime.checkpoints.tensor_file import TensorFile

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FLOAT_TYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
PATCH_EMBEDDING = "patch_embedding.weight"

# A tensor that only a file of this part has, after renaming.
SIGNATURES: dict[Part, str] = {
    "transformer": DIRECTION,
    "vae": "decoder.upsamples.0.residual.2.weight",
    "text_encoder": TOKEN_EMBEDDING,
    "image_encoder": "vision_model.embeddings.class_embedding",
}

# The official umT5 names, as in Kijai's files, to the Hugging Face names, as in Comfy's (model_spec.md 5.4).
TEXT_RENAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.weight$", "encoder.final_layer_norm.weight"),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


class Checkpoint(Mapping[str, NDArray[np.float32]]):
    """The tensors of one part by canonical name, float32, read from the map when asked for."""

    def __init__(self, path: Path) -> None:
        self.file = TensorFile(path)
        self.stored = {_canonical(name): name for name in self.file}
        self.scaled = any(name.endswith(SCALE_SUFFIXES) for name in self.stored)

    @property
    def path(self) -> Path:
        return self.file.path

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name == ORTHONORMAL:
            return orthonormal(self[DIRECTION])
        values = self.file.read(self.stored[name]).astype(np.float32)
        scale = self._scale_of(name)
        return values if scale is None else values * self.file.read(scale).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        """Some rows of a table; the rest of it is not read."""
        values = self.file.read(self.stored[name])[list(indices)].astype(np.float32)
        scale = self._scale_of(name)
        return values if scale is None else values * self.file.read(scale).astype(np.float32)

    def raw(self, name: str) -> NDArray[np.generic]:
        """The stored values of a tensor that is not a weight, such as an embedded tokenizer."""
        return self.file.read(self.stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file[self.stored[name]].shape

    def require(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """WeightsError that names every tensor that is missing, has another shape, or cannot be read."""
        wrong = []
        for name, shape in tensors.items():
            if name not in self.stored:
                wrong.append(f"{name} is missing")
            elif self.shape(name) != shape:
                wrong.append(f"{name} is {list(self.shape(name))} instead of {list(shape)}")
            elif (dtype := self.file[self.stored[name]].dtype) not in FLOAT_TYPES:
                wrong.append(f"{name} has the type {dtype}{self._quantisation(name)}, which is not supported")
            elif self.scaled and dtype.startswith("F8") and self._scale_of(name) is None:
                wrong.append(f"{name} is FP8 and has no scale")
        if wrong:
            raise WeightsError(
                f"{self.path} does not fit: {len(wrong)} of {len(tensors)} tensors are wrong: "
                + "; ".join(wrong)
                + ".",
                "Use the checkpoint of Wan2.2-Animate-14B in bf16, fp16 or scaled FP8.",
            )

    def _scale_of(self, name: str) -> str | None:
        if self.file[self.stored[name]].dtype.startswith("F8"):
            layer = name.removesuffix(".weight")
            for suffix in SCALE_SUFFIXES:
                if layer + suffix in self.stored:
                    return self.stored[layer + suffix]
        return None

    def _quantisation(self, name: str) -> str:
        described = self.stored.get(name.removesuffix("weight") + "comfy_quant")
        if described is None:
            return ""
        return f" ({json.loads(self.file.read(described).tobytes()).get('format', 'unknown format')})"


def orthonormal(direction: NDArray[np.float32]) -> NDArray[np.float32]:
    """Q of the Householder QR with LAPACK's signs: others silently break expressions (model_spec.md 1.6)."""
    return np.linalg.qr(direction + np.float32(1e-8))[0].astype(np.float32)


def find_weights(folder: Path, chosen: Mapping[Part, Path]) -> dict[Part, Checkpoint]:
    """The file of every part: `chosen` as given, the others found in or below `folder` by their content."""
    found: dict[Part, list[Checkpoint]] = {part: [] for part in SIGNATURES}
    if not set(SIGNATURES) <= set(chosen):
        if not folder.is_dir():
            raise WeightsError(f"The weights folder {folder} does not exist.", "Name it with --weights DIR.")
        for checkpoint in _checkpoints_below(folder):
            for part, signature in SIGNATURES.items():
                if signature in checkpoint.stored:
                    found[part].append(checkpoint)
    result = {}
    for part, candidates in found.items():
        option = "--" + part.replace("_", "-")
        if part in chosen:
            result[part] = Checkpoint(chosen[part])
        elif not candidates:
            raise WeightsError(
                f"No {part.replace('_', ' ')} is among the safetensors files in {folder}.",
                f"Put it there, or name it with {option} FILE.",
            )
        elif len(candidates) > 1:
            names = ", ".join(str(c.path) for c in candidates)
            raise WeightsError(
                f"Several files hold the {part.replace('_', ' ')}: {names}.", f"Choose with {option} FILE."
            )
        else:
            result[part] = candidates[0]
    return result


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


def load_weights(folder: Path, chosen: Mapping[Part, Path]) -> tuple[ModelConfig, dict[Part, Checkpoint]]:
    """The model and its checked checkpoints."""
    weights = find_weights(folder, chosen)
    model = identify(weights["transformer"])
    for part, checkpoint in weights.items():
        checkpoint.require(required_tensors(model, part))
    return model, weights


def _checkpoints_below(folder: Path) -> Iterator[Checkpoint]:
    indexes = sorted(folder.rglob("*.safetensors.index.json"))
    shards = set()
    for index in indexes:
        checkpoint = Checkpoint(index)
        shards |= {entry.file for entry in checkpoint.file.values()}
        yield checkpoint
    for path in sorted(folder.rglob("*.safetensors")):
        if path not in shards:
            yield Checkpoint(path)


def _canonical(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if name.startswith(("blocks.", "token_embedding.", "norm.")):
        for pattern, replacement in TEXT_RENAMES:
            name = re.sub(pattern, replacement, name)
    return name
