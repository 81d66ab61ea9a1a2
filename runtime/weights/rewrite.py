"""Writes a checkpoint again in the layout that loads fastest: official names, one safetensors file, and of
each tensor the bytes that the loader would make from the source (convert.cu).

`fp8`: the weights that FP8 engines take are E4M3 with a scale per output row; those that are E4M3 already
keep their bits. `bf16`: no FP8. Other tensors have the engine's type, or stay as they are where that is
float32 and the source is shorter.

Tensors are read, converted and written one after another: memory holds one of them.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import get_native_id
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import LYNX_PARTS, ORTHONORMAL, networks_of, required_tensors
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.fp8 import E4M3
from trt_wan.engines.store.files import PARTIAL, named
from trt_wan.errors import OutputError, UsageError, WeightsError
from trt_wan.runtime.events import FileProgress, Progress, silent
from trt_wan.runtime.video.target import explained, refuse_inputs
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.find_files import checkpoint_in
from trt_wan.runtime.weights.load import closest_model
from trt_wan.runtime.weights.quantise import decoded, quantised
from trt_wan.runtime.weights.recognition.layouts import EMBEDDED
from trt_wan.runtime.weights.stored import Stored
from trt_wan.runtime.weights.tensor_file import DTYPES, SUFFIXES, is_finite

Kind = Literal["fp8", "bf16"]
SCALE = ".scale_weight"
MARKER = "scaled_fp8"
FLOAT32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
PLAIN = (FLOAT32, np.dtype(np.float16), BF16)
WRITTEN_AT_ONCE = 16 << 20  # bytes
REPORTS_EVERY = 0.5  # s
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Written:
    """A tensor of the new file. `make` returns its values when they are to be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def rewrite(
    source: Path, output: Path, kind: Kind | None = None, progress: Progress = silent
) -> dict[str, object]:
    """Returns the part, the type and the size of the file that it wrote. `source` is a file, an index, a
    shard, or a folder with one of these. `kind` None: fp8 for a transformer.

    `output` is replaced when the new file is complete. Raises WeightsError, UsageError, OutputError.
    """
    _require_writable(output)
    checkpoint = Checkpoint(checkpoint_in(source) if source.is_dir() else source)
    refuse_inputs(output, {entry.file for entry in checkpoint.file.entries.values()})
    part, model = _identify(checkpoint)
    kind = kind or ("fp8" if part == "transformer" else "bf16")
    if kind == "fp8" and part not in ("transformer", "camera_control"):
        raise UsageError(
            f"{source} is the {part.replace('_', ' ')}, whose engines take no FP8.", "Use --type bf16."
        )
    tensors = list(_tensors(checkpoint, part, model, kind))
    size = sum(tensor.bytes for tensor in tensors)
    _require_space(output, size)
    temporary = output.with_name(f"{output.name}.{get_native_id()}{PARTIAL}")
    try:
        with named(output), temporary.open("wb") as file:
            _write(file, tensors, output.name, size, progress)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "part": part,
        "model": model.name,
        "type": kind,
        "tensors": len(tensors),
        "bytes": output.stat().st_size,
    }


def _require_writable(output: Path) -> None:
    """Raises UsageError for a name of another format, OutputError for a folder without the right to write."""
    if not output.name.lower().endswith(SUFFIXES):
        raise UsageError(
            f"{output} does not end in {SUFFIXES[0]}, and that is what is written.",
            f"Name it {output.with_suffix(SUFFIXES[0]).name}.",
        )
    there = next(folder for folder in output.absolute().parents if folder.exists())
    with explained(output), TemporaryFile(dir=there):
        pass


def _identify(checkpoint: Checkpoint) -> tuple[Part, ModelConfig]:
    """Raises WeightsError for a file that is no whole part of a model."""
    if checkpoint.layout is None or checkpoint.layout.part in LYNX_PARTS:
        raise WeightsError(
            f"{checkpoint.path} is {checkpoint.what() or 'no checkpoint'}, not a part of Wan2.2-Animate.",
            "Give the transformer, the VAE, umT5, CLIP or Uni3C.",
        )
    part = checkpoint.layout.part
    model = closest_model(checkpoint, part)
    checkpoint.require(required_tensors(model, part), part)
    return part, model


def _tensors(checkpoint: Checkpoint, part: Part, model: ModelConfig, kind: Kind) -> Iterator[Written]:
    """In the order of the new file. Long types come first, so that tensors are aligned; of an FP8 layer the
    scales come behind the weight, whose size is a multiple of 4.
    """
    types = _engine_types(model, part, kind)
    others, fp8 = [], []
    for name in required_tensors(model, part):
        wanted = types.get(name, FLOAT32)  # those without an engine are read as float32
        if wanted == E4M3:
            fp8.append(name)
            continue
        stored = checkpoint.stored(name)
        plain = not stored.blocks and not stored.rotation and stored.scales is None and stored.dtype in PLAIN
        dtype = stored.dtype if plain and wanted == FLOAT32 else wanted
        others.append(Written(name, dtype, stored.shape, _as(stored, dtype)))
    yield from sorted(others, key=lambda tensor: -tensor.dtype.itemsize)
    for name in fp8:
        yield from _fp8(checkpoint, name)
    if fp8:
        yield Written(MARKER, E4M3, (0,), lambda: np.zeros(0, E4M3))
    if EMBEDDED in checkpoint:
        tokenizer = checkpoint.raw(EMBEDDED)
        yield Written(EMBEDDED, tokenizer.dtype, tokenizer.shape, lambda: tokenizer)


def _engine_types(model: ModelConfig, part: Part, kind: Kind) -> dict[str, np.dtype[Any]]:
    """The type that the engines take, by tensor."""
    types: dict[str, np.dtype[Any]] = {}
    for network in networks_of(model, part, kind):
        for n in range(network.repeats):
            types |= {network.weight_key(w.name, n): np.dtype(w.dtype) for w in network.weights}
    types.pop(ORTHONORMAL, None)  # computed from another tensor
    return types


def _fp8(checkpoint: Checkpoint, name: str) -> tuple[Written, Written]:
    """The weight, and the scales of its rows, which are made with it."""
    stored = checkpoint.stored(name)
    as_it_is = stored.dtype == E4M3 and not stored.blocks and not stored.rotation
    scales: list[NDArray[np.float32]] = []

    def weight() -> NDArray[Any]:
        if as_it_is:
            one_each = np.ones(stored.shape[0], np.float32)
            scales.append(one_each if stored.scales is None else np.ascontiguousarray(stored.scales))
            return stored.values.reshape(stored.shape)
        values, made = quantised(decoded(stored))
        scales.append(made)
        return values

    named = name.removesuffix(".weight") + SCALE
    return (
        Written(name, E4M3, stored.shape, weight),
        Written(named, FLOAT32, stored.shape[:1], scales.pop),
    )


def _as(stored: Stored, dtype: np.dtype[Any]) -> Callable[[], NDArray[Any]]:
    if stored.dtype == dtype and stored.scales is None and not stored.rotation and not stored.blocks:
        return lambda: stored.values.reshape(stored.shape)
    return lambda: decoded(stored).astype(dtype)


def _require_space(output: Path, size: int) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < size:
        raise OutputError(
            f"{output} needs {size / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free.",
            "Free some space, or name a file on another disk.",
        )


def _write(file: BinaryIO, tensors: list[Written], name: str, size: int, progress: Progress) -> None:
    header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.bytes],
        }
        start += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    began = told = time.monotonic()
    done = 0
    for tensor in tensors:
        values = np.ascontiguousarray(tensor.make())
        assert values.dtype == tensor.dtype and values.shape == tensor.shape, tensor
        if not is_finite(values):
            raise WeightsError(
                f"The tensor {tensor.name} holds a NaN or an infinity.", "Download the checkpoint again."
            )
        flat = values.reshape(-1).view(np.uint8)
        for first in range(0, flat.size, WRITTEN_AT_ONCE):
            done += file.write(flat[first : first + WRITTEN_AT_ONCE].data)
        if (now := time.monotonic()) - told >= REPORTS_EVERY:
            told = now
            progress(FileProgress(name, 1, 1, done, size, done / max(now - began, 1e-3)))
    file.flush()
    os.fsync(file.fileno())
