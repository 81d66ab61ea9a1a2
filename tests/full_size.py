"""Writes complete checkpoints with random values of sane magnitude in the layouts that people have.

    python tests/full_size.py FOLDER [--transformer fp8|bf16|int8] [--model 14b|tiny] [--seed N] [--camera F]
        [--lynx full|lite]

Layouts are those of model_spec.md 5 and files_and_loras.md 7: Kijai's scaled-FP8 transformer (18.4 GB),
Comfy's in bf16 (34.5 GB) or in int8 ConvRot (18.4 GB; rotated random numbers are random numbers), Comfy's
scaled-FP8 umT5 (6.7 GB), CLIP in fp16, the VAE in bf16, a tokenizer.json of umT5's vocabulary, with
`--camera` Uni3C with F channels in its FFN (3072: 1.9 GB), and with `--lynx` Kijai's adapters in fp16
(8.4 GB).
Random numbers are made once; every tensor is a stretch of them from a place of its own. Needs no torch.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import MODELS, ModelConfig
from trt_wan.engines.fp8 import E4M3_MAX
from trt_wan.engines.lynx import Kind as LynxKind
from trt_wan.engines.lynx import ip_blocks
from trt_wan.runtime.executors import Array
from trt_wan.runtime.weights.random import random_moments
from trt_wan.runtime.weights.tensor_file import DTYPES
from trt_wan.runtime.weights.tiny import blur_kernels
from trt_wan.runtime.weights.tiny_tokenizer import write_tiny_tokenizer

POOL = (1 << 24) + 3  # values; odd, so that rows of a table that repeat the pool differ
LARGEST = 5.0  # standard deviations that an FP8 scale leaves room for
MARKER = "scaled_fp8"
CONVROT = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
TOKENIZER_BYTES = 32 << 20  # more than enough for 256,384 pieces

Kind = tuple[str, float, float]  # type, mean, standard deviation


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: random from the moments of its name, or `values`."""

    dtype: str
    shape: tuple[int, ...]
    mean: float = 0.0
    deviation: float = 0.0
    values: Array | None = None

    @property
    def kind(self) -> Kind:
        return self.dtype, self.mean, self.deviation

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] | None = None

    def ordered(self) -> list[tuple[str, Stored]]:
        """As safetensors orders them: wide types first, then by name."""
        order = {name: (-DTYPES[t.dtype].itemsize, t.dtype, name) for name, t in self.tensors.items()}
        return sorted(self.tensors.items(), key=lambda item: order[item[0]])

    def header(self) -> bytes:
        described: dict[str, object] = {} if self.metadata is None else {"__metadata__": self.metadata}
        start = 0
        for name, tensor in self.ordered():
            stop = start + tensor.nbytes
            described[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header()) + sum(tensor.nbytes for tensor in self.tensors.values())


class Pool:
    """Random numbers that tensors are cut from."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._normal = self._rng.standard_normal(POOL, dtype=np.float32)
        self._converted: dict[Kind, Array] = {}

    def start(self) -> int:
        """A place to begin, the same for the same seed and the same order of calls."""
        return int(self._rng.integers(POOL))

    def convert(self, tensors: Iterable[Stored]) -> None:
        """Converts the pool once for moments of many numbers. Call before threads share this object."""
        counts: Counter[Kind] = Counter()
        for tensor in tensors:
            if tensor.values is None:
                counts[tensor.kind] += math.prod(tensor.shape)
        for kind, count in counts.items():
            if count > POOL and kind not in self._converted:
                self._converted[kind] = self._with_moments(kind, 0, POOL)

    def pieces(self, tensor: Stored, start: int) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a tensor that begins at number `start`."""
        if tensor.values is not None:
            yield np.ascontiguousarray(tensor.values).reshape(-1).view(np.uint8)
            return
        left, converted = math.prod(tensor.shape), self._converted.get(tensor.kind)
        while left:
            stop = min(start + left, POOL)
            if converted is None:
                piece = self._with_moments(tensor.kind, start, stop)
            else:
                piece = converted[start:stop]
            yield piece.view(np.uint8)
            left, start = left - len(piece), 0

    def _with_moments(self, kind: Kind, start: int, stop: int) -> Array:
        dtype, mean, deviation = kind
        values = np.float32(mean) + np.float32(deviation) * self._normal[start:stop]
        if dtype.startswith("F8"):  # beyond the largest number is NaN
            np.clip(values, -E4M3_MAX, E4M3_MAX, out=values)
        if dtype == "I8":
            np.clip(np.rint(values), -127, 127, out=values)
        return values.astype(DTYPES[dtype])


def layouts(model: ModelConfig, transformer: str) -> dict[str, Layout]:
    """The files by name."""
    blur = {name: _given("BF16", values) for name, values in blur_kernels(model.motion).items()}
    shapes = required_tensors(model, "transformer")
    linears = {n for n, s in shapes.items() if n.startswith("blocks.") and _is_matrix(n, s)}
    if transformer == "fp8":
        marker = {MARKER: Stored("F8_E4M3", (2,), values=np.zeros(2, DTYPES["F8_E4M3"]))}
        name = "Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors"
        files = {name: Layout({**_random("BF16", shapes, linears), **blur, **marker})}
    elif transformer == "int8":
        name = "wan2.2_animate_14B_int8_convrot.safetensors"
        files = {name: Layout({**_convrot(shapes, linears), **blur}, {})}
    else:
        files = {"wan2.2_animate_14B_bf16.safetensors": Layout({**_random("BF16", shapes), **blur})}
    text = required_tensors(model, "text_encoder")
    linears = {n for n, s in text.items() if ".layer." in n and "relative" not in n and _is_matrix(n, s)}
    marker = {MARKER: Stored("F8_E4M3", (0,), values=np.zeros(0, DTYPES["F8_E4M3"]))}
    vae = _random("BF16", required_tensors(model, "vae"))
    image = _random("F16", required_tensors(model, "image_encoder"))
    return files | {
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors": Layout({**_random("F16", text, linears), **marker}),
        "Wan2_1_VAE_bf16.safetensors": Layout(vae, {"format": "pt"}),
        "clip_vision_h.safetensors": Layout(image),
    }


def camera_layout(model: ModelConfig, ffn_dim: int) -> dict[str, Layout]:
    """Uni3C as it is published, with the mask branch that nothing reads (addons_spec.md 1.1)."""
    model = replace(model, camera=replace(model.camera, ffn_dim=ffn_dim))
    shapes = required_tensors(model, "camera_control")
    dim, mask = model.transformer.dim, "controlnet_mask_embedding"
    more: dict[str, tuple[int, ...]] = {
        f"{mask}.mask_proj.0.weight": (256, 7, 4, 8, 8),
        f"{mask}.mask_proj.0.bias": (256,),
        f"{mask}.mask_proj.1.weight": (256,),
        f"{mask}.mask_proj.1.bias": (256,),
        f"{mask}.mask_zero_proj.weight": (dim, 256, 1, 2, 2),
        f"{mask}.mask_zero_proj.bias": (dim,),
    }
    patch = {name: shape for name, shape in shapes.items() if name.startswith("controlnet_patch")}
    rest = {name: shape for name, shape in shapes.items() if name not in patch}
    tensors = {**_random("F32", patch), **_random("F16", {**rest, **more})}
    return {"Wan21_Uni3C_controlnet_fp16.safetensors": Layout(tensors)}


def lynx_layouts(model: ModelConfig, kind: LynxKind = "full") -> dict[str, Layout]:
    """Kijai's files of Lynx by name: adapters in fp16, the resampler in fp32."""
    blocks = ip_blocks(model, kind)
    ip, ref, resampler = (
        required_tensors(model, part, kind) for part in ("lynx_ip", "lynx_ref", "lynx_resampler")
    )

    def renamed(
        shapes: Mapping[str, tuple[int, ...]], inside: str, numbers: Sequence[int]
    ) -> dict[str, Stored]:
        named = {}
        for name, shape in shapes.items():
            n, _, rest = name.partition(".")
            named[f"blocks.{numbers[int(n)]}.{inside}.{rest}"] = shape
        return _random("F16", named)

    layers = range(model.transformer.layers)
    return {
        f"Wan2_1-T2V-14B-Lynx_{kind}_ip_layers_fp16.safetensors": Layout(
            renamed(ip, "cross_attn.ip_adapter", blocks)
        ),
        f"lynx_{kind}_resampler_fp32.safetensors": Layout(_random("F32", resampler)),
        "Wan2_1-T2V-14B-Lynx_full_ref_layers_fp16.safetensors": Layout(
            renamed(ref, "self_attn.ref_adapter", layers)
        ),
    }


def write_full_size(
    folder: Path,
    model: ModelConfig,
    transformer: str = "fp8",
    seed: int = 0,
    more: Mapping[str, Layout] = {},  # noqa: B006  (not changed)
) -> list[Path]:
    """Returns the files written, the same bytes for the same seed. Raises OSError for a small disk."""
    files = {**layouts(model, transformer), **more}
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(f.size for f in files.values()) + TOKENIZER_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free, the files need {needed / 1e9:.1f} GB.")
    pool = Pool(seed)
    starts = {name: [pool.start() for _ in layout.tensors] for name, layout in files.items()}
    pool.convert(tensor for layout in files.values() for tensor in layout.tensors.values())
    with ThreadPoolExecutor() as threads:
        tokenizer = folder / "tokenizer.json"
        done = [threads.submit(_write, folder / n, files[n], pool, starts[n]) for n in files]
        done.append(threads.submit(write_tiny_tokenizer, tokenizer, model.text.vocabulary))
        for future in done:
            future.result()
    return [*(folder / name for name in files), tokenizer]


def _write(path: Path, layout: Layout, pool: Pool, starts: list[int]) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb", buffering=0) as file:
        file.write(layout.header())
        for (_, tensor), start in zip(layout.ordered(), starts, strict=True):
            for piece in pool.pieces(tensor, start):
                left = memoryview(piece)
                while left:  # one call writes 2 GB at most
                    left = left[file.write(left) or 0 :]
    temporary.replace(path)


def _random(
    dtype: str, shapes: Mapping[str, tuple[int, ...]], fp8: set[str] | None = None
) -> dict[str, Stored]:
    """Tensors of the type `dtype`; those in `fp8` are F8_E4M3 and have a scale beside them."""
    tensors = {}
    for name, shape in shapes.items():
        mean, deviation = random_moments(name, shape)
        if name in (fp8 or ()):
            scale = np.asarray(deviation * LARGEST / E4M3_MAX, np.float32)
            tensors[name] = Stored("F8_E4M3", shape, 0.0, E4M3_MAX / LARGEST)
            tensors[name.removesuffix("weight") + "scale_weight"] = _given("F32", scale)
        else:
            tensors[name] = Stored(dtype, shape, mean, deviation)
    return tensors


def _convrot(shapes: Mapping[str, tuple[int, ...]], linears: set[str]) -> dict[str, Stored]:
    """Those in `linears` are I8 and have a scale for each row beside them, and the name of the format."""
    tensors = _random("BF16", {name: shape for name, shape in shapes.items() if name not in linears})
    for name in linears:
        scale = np.full((shapes[name][0], 1), random_moments(name, shapes[name])[1] * LARGEST / 127)
        tensors[name] = Stored("I8", shapes[name], 0.0, 127 / LARGEST)
        tensors[name.removesuffix("weight") + "weight_scale"] = _given("F32", scale)
        tensors[name.removesuffix("weight") + "comfy_quant"] = _given("U8", np.frombuffer(CONVROT, np.uint8))
    return tensors


def _given(dtype: str, values: Array) -> Stored:
    return Stored(dtype, values.shape, values=values.astype(DTYPES[dtype]))


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transformer", choices=("fp8", "bf16", "int8"), default="fp8")
    parser.add_argument("--model", choices=sorted(MODELS), default="14b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--camera", type=int, metavar="F", help="write Uni3C too")
    parser.add_argument("--lynx", choices=("full", "lite"), help="write the files of Lynx too")
    asked = parser.parse_args()
    model = MODELS[asked.model]
    more = {} if asked.camera is None else camera_layout(model, asked.camera)
    more |= {} if asked.lynx is None else lynx_layouts(model, asked.lynx)
    began = time.perf_counter()
    try:
        paths = write_full_size(asked.folder, model, asked.transformer, asked.seed, more)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    for path in paths:
        print(f"{path.stat().st_size:>14,} {path}")
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
