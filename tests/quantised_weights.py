"""Weights in the quantised forms that people have, GGUF and int8, with the float32 numbers they stand for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import k_quants
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from safetensors.numpy import save_file

from trt_wan.engines.int8 import rotated
from trt_wan.runtime.weights.gguf_file import GgufFile
from trt_wan.runtime.weights.stored import BLOCKS, Stored, Tensors
from trt_wan.runtime.weights.tensor_file import TensorFile

FORMS = ("int8", "int8 rows", "int8 convrot", *BLOCKS)  # of `quantised_file`
# Where the halves lie in a block: the scale, and the minimum.
SCALES: dict[str, tuple[int, ...]] = {
    **{"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
}
# Parts of Wan's names that llama-quantize leaves alone (ComfyUI-GGUF, tools/lcpp.patch).
KEPT = (
    "modulation.",
    "patch_embedding.",
    "text_embedding.",
    "time_projection.",
    "time_embedding.",
    "img_emb.",
    "head.",
)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """A tensor as it is written, and as it must be read."""

    kind: str
    data: NDArray[Any]
    values: NDArray[np.float32]


def random_blocks(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    """uint8 [rows, bytes per row] of any bits, with scales of a sane size."""
    count, size = BLOCKS[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // count, size), np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = rng.uniform(-0.02, 0.02, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def extreme_blocks(kind: str, rng: np.random.Generator) -> Any:
    """uint8 [rows, bytes]: blocks with one bit set, with all but one; scales of any size, 0, Inf and NaN."""
    count, size = BLOCKS[kind]
    ones = np.concatenate([np.zeros((1, size), np.uint8), np.eye(size, dtype=np.uint8)])
    blocks = np.concatenate([ones << bit for bit in range(8)])
    blocks = np.concatenate([blocks, ~blocks, rng.integers(0, 256, (512, size), np.uint8)])
    halves = np.array([0, -0.0, 1, -1, 6e-8, 6e-5, 65504, -65504, np.inf, np.nan, 0.1], np.float16)
    for at in SCALES[kind]:
        chosen = rng.integers(0, len(halves), len(blocks))
        chosen[: 8 * (size + 1)] = 2  # so that the bits show
        blocks[:, at : at + 2] = halves[chosen][:, None].view(np.uint8)
    return blocks


def decoded(blocks: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    return gguf.dequantize(blocks, GGMLQuantizationType[kind])


def as_gguf(values: NDArray[np.float32], kind: str) -> Made:
    """The values in a GGUF type. `rng` is not used; it can go when tests/made_layouts.py passes none."""
    if kind in k_quants.WRITERS:
        data = k_quants.quantise(values, kind)
    else:
        data = gguf.quantize(np.ascontiguousarray(values, np.float32), GGMLQuantizationType[kind])
    return Made(kind, data, decoded(data, kind).reshape(values.shape))


def wan_type(name: str, shape: Shape, kind: str, base: str = "F16") -> str:
    """The type that a file for Wan of the quantisation `kind` has for a tensor."""
    if len(shape) > 4 or len(shape) == 1 or np.prod(shape) <= 1024 or ".modulation" in name:
        return "F32"
    matrix = len(shape) == 2 and not any(part in name for part in KEPT)
    return kind if matrix and shape[-1] % BLOCKS.get(kind, (1,))[0] == 0 else base


def write_gguf(
    path: Path,
    tensors: Mapping[str, Made],
    original_shapes: Mapping[str, Shape] | None = None,
    more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> None:
    """`original_shapes` go into the metadata, and what `more` adds."""
    writer = GGUFWriter(path, "wan")
    more(writer)
    for name, shape in (original_shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, made in tensors.items():
        writer.add_tensor(name, made.data, raw_dtype=GGMLQuantizationType[made.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf_header(path: Path, shapes: Mapping[str, Shape], kind: str, base: str = "F16") -> None:
    """A file of the right size without values."""
    writer = GGUFWriter(path, "wan")
    for name, shape in shapes.items():
        stored = wan_type(name, shape, kind, base)
        count, size = GGML_QUANT_SIZES[GGMLQuantizationType[stored]]
        nbytes = int(np.prod(shape)) // count * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    data = sum(writer.ggml_pad(tensor.nbytes, 32) for tensor in writer.tensors[0].values())
    writer.close()
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(-(-size // 32) * 32 + data)


class QuantisedTensors:
    """Tensors of which some lie in a file of quantised ones."""

    def __init__(self, base: Tensors, quantised: Mapping[str, Stored]) -> None:
        self.base, self.quantised = base, quantised

    def stored(self, name: str) -> Stored:
        return self.quantised.get(name) or self.base.stored(name)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.stored(name).float32()

    def rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        return self.stored(name).rows(indices)


def with_quantised_block(base: Any, path: Path, kind: str) -> QuantisedTensors:
    """A transformer whose matrices of block 0, with channels of different sizes, lie in a file of `kind`."""
    sizes = np.linspace(0.1, 3, 64, dtype=np.float32)[:, None]
    names = [
        n for n in base if n.startswith("blocks.0.") and n.endswith("weight") and len(base.shape(n)) == 2
    ]
    matrices = {name: base[name] * np.resize(sizes, (base.shape(name)[0], 1)) for name in names}
    return QuantisedTensors(base, quantised_file(path, kind, matrices)[0])


def quantised_file(
    path: Path, kind: str, matrices: Mapping[str, NDArray[np.float32]]
) -> tuple[dict[str, Stored], dict[str, NDArray[np.float32]]]:
    """Matrices written in a type of BLOCKS, or as "int8" (a scale per tensor), "int8 rows" or "int8 convrot".
    Returns them as they are read, and the values that they stand for.
    """
    if kind in BLOCKS:
        made = {name: as_gguf(values, kind) for name, values in matrices.items()}
        write_gguf(path, made)
        file = GgufFile(path)
        stored = {
            name: Stored(file.read(name), None, path, entry.start, blocks=entry.dtype, dims=entry.shape)
            for name, entry in file.items()
        }
        return stored, {name: tensor.values for name, tensor in made.items()}
    rotation = 256 if kind == "int8 convrot" else 0
    tensors = {name: as_int8(values, rotation, kind != "int8") for name, values in matrices.items()}
    save_file({name: values for name, (values, _) in tensors.items()}, path)
    plain = TensorFile(path)
    stored = {
        name: Stored(
            plain.read(name),
            np.broadcast_to(scales.reshape(-1), len(matrices[name])),
            path,
            plain[name].start,
            rotation,
        )
        for name, (_, scales) in tensors.items()
    }
    return stored, dict(matrices)


def as_int8(
    values: NDArray[np.float32], rotation: int = 0, per_row: bool = True
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 [rows, columns] and scales [rows, 1] or []: files_and_loras.md 7."""
    turned = rotated(values, rotation) if rotation else values
    most = np.abs(turned).max(axis=1, keepdims=True) if per_row else np.abs(turned).max()
    scales = np.maximum(most / np.float32(127), np.float32(1e-30))
    return np.clip(np.round(turned / scales), -128, 127).astype(np.int8), scales.astype(np.float32)
