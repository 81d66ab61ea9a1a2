"""Full-size checkpoints: the published sizes, and tiny ones that the loader takes."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from full_size import LARGEST, MARKER, layouts, write_full_size
from made_layouts import V2, diffusers
from quantised_weights import write_gguf_header

from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.describe import describe
from trt_wan.runtime.weights.find_tokenizer import find_tokenizer
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.random import random_moments
from trt_wan.runtime.weights.tensor_file import DTYPES
from trt_wan.runtime.weights.tiny import blur_kernels

PUBLISHED = {  # bytes, model_spec.md 5.2 and 5.4
    "wan2.2_animate_14B_bf16.safetensors": (34_549_787_368, 0),
    "Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors": (18_401_760_586, 4_000),
    "wan2.2_animate_14B_int8_convrot.safetensors": (18_413_068_672, 0),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (6_735_906_897 - 4_548_313, 4_000),  # without its SentencePiece
    "Wan2_1_VAE_bf16.safetensors": (253_806_278, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_have_the_published_sizes(name: str) -> None:
    files = {k: v for kind in ("fp8", "bf16", "int8") for k, v in layouts(ANIMATE_14B, kind).items()}
    size, tolerance = PUBLISHED[name]
    assert abs(files[name].size - size) <= tolerance


@pytest.mark.parametrize("transformer", ["fp8", "bf16"])
def test_the_loader_takes_them(transformer: str, tmp_path: Path) -> None:
    write_full_size(tmp_path, TINY, transformer)
    config, weights = load_weights([tmp_path], {})
    assert config == TINY
    for part in PARTS:
        for name, shape in required_tensors(TINY, part).items():
            values = weights[part][name]
            mean, deviation = random_moments(name, shape)
            assert values.shape == shape and np.isfinite(values).all(), name
            if values.size > 1000:
                assert abs(values.mean() - mean) < 0.2 * deviation, name
                assert values.std() == pytest.approx(deviation, rel=0.1), name
                assert np.abs(values).max() < mean + 1.1 * deviation * LARGEST, name
    types = {name: entry.dtype for name, entry in weights["transformer"].file.entries.items()}
    fp8 = transformer == "fp8"
    assert types["blocks.0.ffn.0.weight"] == ("F8_E4M3" if fp8 else "BF16")
    assert types.get("blocks.0.ffn.0.scale_weight") == ("F32" if fp8 else None)
    assert types["head.head.weight"] == "BF16"
    assert weights["text_encoder"].file["shared.weight"].dtype == "F16"
    tokenizer = find_tokenizer(None, [tmp_path], weights["text_encoder"], TINY.text.length)
    assert max(tokenizer.encode("two cats")) < TINY.text.vocabulary


def test_bytes_follow_the_seed(tmp_path: Path) -> None:
    first = write_full_size(tmp_path / "a", TINY, seed=1)
    same = write_full_size(tmp_path / "b", TINY, seed=1)
    other = write_full_size(tmp_path / "c", TINY, seed=2)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in same]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first[:-1], other[:-1], strict=True))


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"0\.0 GB free"):
        write_full_size(tmp_path, TINY)
    assert not list(tmp_path.iterdir())


# ---- full-size headers over sparse files ----

Shape = tuple[int, ...]
Listed = list[tuple[str, str, Shape]]  # name, type and shape, in the order of the file
CONVROT = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'


def official() -> dict[str, Shape]:
    """The 1441 tensors of the official files."""
    blur = {name: values.shape for name, values in blur_kernels(ANIMATE_14B.motion).items()}
    return required_tensors(ANIMATE_14B, "transformer") | blur


def block_linears(shapes: dict[str, Shape], among: tuple[str, ...] = ("blocks.",)) -> list[str]:
    return [n for n, s in shapes.items() if n.startswith(among) and len(s) == 2 and n.endswith(".weight")]


def sparse(path: Path, tensors: Listed, metadata: dict[str, str] | None = None) -> Path:
    """Writes the header as safetensors does; the values take no room on the disk."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, path.stat().st_size + position)
    return path


def filled(path: Path, ends: Sequence[str], values: bytes) -> Path:
    """Writes the same values into all tensors with such names, which the loader checks."""
    file = Checkpoint(path).file
    with path.open("r+b") as raw:
        for name, entry in file.entries.items():
            if name.endswith(tuple(ends)):
                raw.seek(entry.start)
                raw.write(values * ((entry.stop - entry.start) // len(values)))
    return path


ONE = np.ones(1, np.float32).tobytes()


def comfy_bf16(folder: Path) -> Path:
    return sparse(folder / "m.safetensors", [(n, "BF16", s) for n, s in sorted(official().items())])


def shards(folder: Path, shapes: dict[str, Shape], dtype: str, count: int) -> Path:
    names, found = sorted(shapes), {}
    for k in range(count):
        file = folder / f"diffusion_pytorch_model-{k + 1:05}-of-{count:05}.safetensors"
        sparse(file, [(name, dtype, shapes[name]) for name in names[k::count]])
        found |= dict.fromkeys(names[k::count], file.name)
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": found}))
    return path


def official_shards(folder: Path) -> Path:
    return shards(folder, official(), "BF16", 4)


def diffusers_shards(folder: Path) -> Path:
    import torch

    with torch.device("meta"):
        wanted = required_tensors(ANIMATE_14B, "transformer")
        empty = {name: torch.empty(shape) for name, shape in wanted.items()}
        shapes = {name: tuple(values.shape) for name, values in diffusers(empty).items()}
    return shards(folder, shapes, "F32", 7)


def kj(among: tuple[str, ...], scale: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shapes = official()
        linears = set(block_linears(shapes, among))
        scales: Listed = [(n.removesuffix("weight") + scale, "F32", ()) for n in sorted(linears)]
        rest: Listed = [(n, "BF16", s) for n, s in sorted(shapes.items()) if n not in linears]
        fp8: Listed = [(n, "F8_E4M3", shapes[n]) for n in sorted(linears)] + [(MARKER, "F8_E4M3", (2,))]
        return filled(sparse(folder / "kj.safetensors", scales + rest + fp8), [scale], ONE)

    return make


def int8_convrot(folder: Path) -> Path:
    """ComfyUI's, in the order F32, BF16, I8, U8, each by name (files_and_loras.md 7)."""
    shapes = official()
    linears = sorted(block_linears(shapes))
    layers = [name.removesuffix("weight") for name in linears]
    scales: Listed = [(f"{layer}weight_scale", "F32", (shapes[f"{layer}weight"][0], 1)) for layer in layers]
    rest: Listed = [(n, "BF16", s) for n, s in sorted(shapes.items()) if n not in linears]
    numbers: Listed = [(n, "I8", shapes[n]) for n in linears]
    described: Listed = [(f"{layer}comfy_quant", "U8", (len(CONVROT),)) for layer in layers]
    path = sparse(folder / "int8.safetensors", scales + rest + numbers + described, {})
    return filled(filled(path, ["weight_scale"], ONE), ["comfy_quant"], CONVROT)


def gguf(folder: Path) -> Path:
    write_gguf_header(folder / "q4.gguf", official(), "Q4_K")
    return folder / "q4.gguf"


@dataclass(frozen=True)
class Header:
    make: Callable[[Path], Path]
    layout: str
    encoding: str
    quantised: int
    size: int = 0  # published, exact
    about: int = 0  # published with few digits, or another header


OFFICIAL, FP8 = "safetensors, official names", "scaled F8_E4M3"
HEADERS = {
    "Comfy bf16": Header(comfy_bf16, OFFICIAL, "BF16", 0, 34_549_787_368),
    "official shards": Header(official_shards, OFFICIAL, "BF16", 0, about=34_549_787_368),
    "diffusers shards": Header(diffusers_shards, "safetensors, diffusers", "F32", 0),
    "KJ v1": Header(kj(("blocks.",), "scale_weight"), OFFICIAL, FP8, 480, about=18_401_760_586),
    "KJ v2": Header(kj(V2, "scale_weight"), OFFICIAL, FP8, 513, about=17_316_943_016),
    "int8 ConvRot": Header(int8_convrot, OFFICIAL, "int8 ConvRot", 480, 18_413_068_672),
    "GGUF Q4_K": Header(gguf, "gguf, official names", "Q4_K", 510),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_full_size_header_is_recognised_in_under_a_second(name: str, tmp_path: Path) -> None:
    row = HEADERS[name]
    path = row.make(tmp_path)
    start = time.perf_counter()
    found = describe(path)
    seconds = time.perf_counter() - start
    assert (found.what, found.model, found.problem) == ("the transformer of Wan2.2-Animate", "14b", "")
    assert (found.layout, found.encoding, found.quantised) == (row.layout, row.encoding, row.quantised)
    assert found.parameters == 17_274_816_884 and not found.missing and not found.unexpected
    if row.size:
        assert found.bytes == row.size
    if row.about:
        assert abs(found.bytes - row.about) < 300_000
    start = time.perf_counter()
    Checkpoint(path, "transformer").require(required_tensors(ANIMATE_14B, "transformer"), "transformer")
    opened = time.perf_counter() - start
    assert seconds < 1 and opened < 1, f"{seconds:.2f} s, {opened:.2f} s"  # measured 0.2 s
