"""Checkpoint files in every layout of files_and_loras.md section 1, made from the tiny model's weights.

A maker writes a file (or a folder) and returns the path to open. Names of other layouts are made by
diffusers' own converters and by tables written here from model_spec.md 5.4.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from numpy.typing import NDArray
from quantised_weights import as_gguf, as_int8, wan_type, write_gguf
from safetensors.torch import save_file

from trt_wan.engines.config import TINY
from trt_wan.runtime.weights.tiny import blur_kernels

# Two blocks with a fuser each: fewer bytes to write than TINY's.
SMALL = replace(TINY, transformer=replace(TINY.transformer, layers=2, fuser_interval=1))

Weights = Mapping[str, NDArray[np.float32]]
Tensors = dict[str, torch.Tensor]
Maker = Callable[[Path, Weights], Path]

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
V2 = (
    "blocks.",
    "text_embedding",
    "time_",
    "head.head",
    "img_emb.proj",
    "face_adapter",
    "face_encoder.out_proj",
)


def rotated(values: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    """Each run of `group` columns times H: the Kronecker power of J/2 - P (files_and_loras.md 7)."""
    four, h = np.full((4, 4), 0.5) - np.eye(4)[::-1], np.ones((1, 1))
    while len(h) < group:
        h = np.kron(h, four)
    return (values.reshape(-1, group) @ h).reshape(values.shape).astype(np.float32)


def plain(weights: Weights, dtype: torch.dtype = BF16) -> Tensors:
    return {name: torch.from_numpy(values.copy()).to(dtype) for name, values in weights.items()}


def kernels() -> Tensors:
    blur = blur_kernels(TINY.motion)
    return {name: torch.from_numpy(np.float32(values)).to(BF16) for name, values in blur.items()}


def is_linear(name: str, values: Any, among: tuple[str, ...] = ("blocks.",)) -> bool:
    return values.ndim == 2 and name.endswith(".weight") and name.startswith(among)


def saved(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: values.contiguous() for name, values in tensors.items()}, path, metadata)
    return path


def renamed(change: Callable[[str], str], dtype: torch.dtype = BF16, name: str = "x.safetensors") -> Maker:
    """All tensors in one type under other names."""
    return lambda folder, weights: saved(
        folder / name,
        {change(n): values for n, values in (plain(weights, dtype) | kernels_of(weights)).items()},
    )


def kernels_of(weights: Weights) -> Tensors:
    return kernels() if "patch_embedding.weight" in weights and "head.modulation" in weights else {}


def prefixed(prefix: str, dtype: torch.dtype = BF16) -> Maker:
    return renamed(lambda name: prefix + name, dtype)


def fp8(
    dtype: torch.dtype = E4M3,
    among: tuple[str, ...] = ("blocks.",),
    rest: torch.dtype = BF16,
    scale: str = "scale_weight",
    shape: tuple[int, ...] = (),
    scale_type: torch.dtype = F32,
    per_row: bool = False,
    more: Callable[[Tensors], Tensors] = lambda tensors: {},
    metadata: Callable[[list[str]], dict[str, str] | None] = lambda layers: None,
    names: Callable[[str], str] = lambda name: name,
) -> Maker:
    """Scaled FP8: some linears with a scale each. `more` adds to the tensors, or takes their place."""

    def make(folder: Path, weights: Weights) -> Path:
        tensors: Tensors = {}
        layers = []
        for name, values in weights.items():
            weight = torch.from_numpy(values.copy())
            if is_linear(name, weight, among):
                most = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()
                factor = (most / LARGEST[dtype]).to(scale_type)
                layer = names(name).removesuffix(".weight")
                layers.append(layer)
                tensors[f"{layer}.weight"] = (weight / factor.to(F32)).to(dtype)
                if scale:
                    tensors[f"{layer}.{scale}"] = factor if per_row else factor.reshape(shape)
            else:
                tensors[names(name)] = weight.to(rest)
        tensors |= kernels_of(weights)
        return saved(folder / "fp8.safetensors", tensors | more(tensors), metadata(layers))

    return make


def described(
    described_as: Mapping[str, object], extra: Mapping[str, Any] | None = None
) -> Callable[..., Tensors]:
    """Adds a comfy_quant tensor to every layer that has a weight_scale, and the siblings `extra`."""

    def more(tensors: Tensors) -> Tensors:
        text = torch.frombuffer(bytearray(json.dumps(described_as).encode()), dtype=torch.uint8)
        added: Tensors = {}
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            layer = name.removesuffix(".weight_scale")
            added[f"{layer}.comfy_quant"] = text.clone()
            for last, value in (extra or {}).items():
                added[f"{layer}.{last}"] = value(tensors[f"{layer}.weight"])
        return added

    return more


def in_metadata(form: Mapping[str, object]) -> Callable[[list[str]], dict[str, str]]:
    return lambda layers: {
        "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": dict.fromkeys(layers, form)})
    }


def cast(dtype: torch.dtype, everything: bool = False) -> Maker:
    """Plain FP8, without scales."""

    def make(folder: Path, weights: Weights) -> Path:
        tensors = {
            name: values.to(dtype if everything or is_linear(name, values) else BF16)
            for name, values in plain(weights, F32).items()
        }
        return saved(folder / "cast.safetensors", tensors | kernels_of(weights))

    return make


def int8(
    options: Mapping[str, object] | None,
    group: int = 0,
    per_row: bool = True,
    scale_shape: tuple[int, ...] | None = None,
    where: str = "tensor",
) -> Maker:
    """ComfyUI's int8_tensorwise; rotated with `group` columns (files_and_loras.md 7)."""

    def make(folder: Path, weights: Weights) -> Path:
        tensors = plain(weights) | kernels_of(weights)
        layers = []
        for name, values in weights.items():
            if is_linear(name, values):
                turned = rotated(values, group) if group else values
                numbers, factors = as_int8(turned, 0, per_row)
                scales = torch.from_numpy(np.asarray(factors))
                layer = name.removesuffix(".weight")
                layers.append(layer)
                tensors[name] = torch.from_numpy(numbers)
                tensors[f"{layer}.weight_scale"] = scales.reshape(scale_shape or scales.shape)
        if where == "metadata":
            return saved(folder / "int8.safetensors", tensors, in_metadata(options or {})(layers))
        added = {} if options is None else described(options)(tensors)
        return saved(folder / "int8.safetensors", tensors | added)

    return make


def gguf_file(kind: str) -> Maker:
    def make(folder: Path, weights: Weights) -> Path:
        made = {name: as_gguf(v, wan_type(name, v.shape, kind)) for name, v in weights.items()}
        for name, one in made.items():  # types that cannot be written have other values: those are wanted
            if isinstance(weights, dict):
                weights[name] = one.values if one.kind.endswith("_K") else weights[name]
        write_gguf(folder / "x.gguf", made)
        return folder / "x.gguf"

    return make


def shards(count: int, index: bool, names: Callable[[Tensors], Tensors] = dict, lose: int = 0) -> Maker:
    """Shards as the Hub has them; returns the index, or the second shard where there is none."""

    def make(folder: Path, weights: Weights) -> Path:
        tensors = names(plain(weights) | kernels_of(weights))
        order, files, found = sorted(tensors), [], {}
        for k in range(count):
            path = folder / f"diffusion_pytorch_model-{k + 1:05}-of-{count:05}.safetensors"
            files.append(saved(path, {name: tensors[name] for name in order[k::count]}))
            found |= dict.fromkeys(order[k::count], path.name)
        if lose:
            files[lose - 1].unlink()
        if not index:
            return files[1]
        target = folder / "diffusion_pytorch_model.safetensors.index.json"
        target.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": found}))
        return target

    return make


def diffusers(tensors: Tensors) -> Tensors:
    """The names and shapes of diffusers, by its own converters."""
    convert = (
        convert_wan_transformer_to_diffusers if "head.modulation" in tensors else convert_wan_vae_to_diffusers
    )
    converted = convert({n: v for n, v in tensors.items() if not n.endswith(".kernel")})
    return {name: values.clone() for name, values in converted.items()}


def diffusers_file(dtype: torch.dtype = BF16) -> Maker:
    return lambda folder, weights: saved(
        folder / "diffusion_pytorch_model.safetensors", diffusers(plain(weights, dtype))
    )


def diffusers_folder(folder: Path, weights: Weights) -> Path:
    shards(7, True, diffusers)(folder, weights)
    (folder / "config.json").write_text('{"_class_name": "WanAnimateTransformer3DModel"}')
    return folder


def hub_cache(folder: Path, weights: Weights) -> Path:
    """Links to blobs, as huggingface_hub has them."""
    index = shards(4, True)(folder / "blobs", weights)
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for k, path in enumerate(sorted(index.parent.iterdir())):
        blob = path.rename(index.parent / f"{k:064x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot / index.name


def moved_fusers(name: str) -> str:
    return re.sub(
        r"^face_adapter\.fuser_blocks\.(\d+)\.",
        lambda match: f"blocks.{5 * int(match[1])}.fuser_block.",
        name,
    )


def pickled(
    wrapper: str = "",
    name: str = "x.pth",
    change: Callable[[str], str] = lambda name: name,
    dtype: torch.dtype = BF16,
) -> Maker:
    """By torch.save; a matrix is transposed in memory, as some are."""

    def make(folder: Path, weights: Weights) -> Path:
        tensors = {change(n): values for n, values in plain(weights, dtype).items()}
        first = next(name for name, values in tensors.items() if values.ndim >= 2)
        tensors[first] = tensors[first].transpose(0, 1).contiguous().transpose(0, 1)
        torch.save({wrapper: tensors} if wrapper else tensors, folder / name)
        return folder / name

    return make


def official_umt5(name: str) -> str:
    """The Hugging Face name of a umT5 tensor as the official code has it, written out (model_spec.md 5.4)."""
    given = {"shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight"}
    if name in given:
        return given[name]
    _, _, n, _, layer, *rest = name.split(".")
    table = {
        "SelfAttention.q.weight": "attn.q.weight",
        "SelfAttention.k.weight": "attn.k.weight",
        "SelfAttention.v.weight": "attn.v.weight",
        "SelfAttention.o.weight": "attn.o.weight",
        "SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
        "DenseReluDense.wi_0.weight": "ffn.gate.0.weight",
        "DenseReluDense.wi_1.weight": "ffn.fc1.weight",
        "DenseReluDense.wo.weight": "ffn.fc2.weight",
        "layer_norm.weight": f"norm{int(layer) + 1}.weight",
    }
    return f"blocks.{n}.{table['.'.join(rest)]}"


def llama_umt5(name: str) -> str:
    """As ComfyUI-GGUF's umT5 files have it."""
    official = official_umt5(name)
    for old, new in (
        ("token_embedding", "token_embd"),
        ("norm.weight", "enc.output_norm.weight"),
        (".attn.", ".attn_"),
        (".pos_embedding.embedding", ".attn_rel_b"),
        (".norm1", ".attn_norm"),
        (".norm2", ".ffn_norm"),
        (".ffn.gate.0", ".ffn_gate"),
        (".ffn.fc1", ".ffn_up"),
        (".ffn.fc2", ".ffn_down"),
    ):
        if official == old or not old.startswith("norm"):
            official = official.replace(old, new)
    return official.replace("blocks.", "enc.blk.")


def llama_file(folder: Path, weights: Weights) -> Path:
    write_gguf(folder / "umt5.gguf", {llama_umt5(n): as_gguf(v, "F16") for n, v in weights.items()})
    return folder / "umt5.gguf"


def open_clip(prefix: str, pickle: bool = False, dtype: torch.dtype = F16) -> Maker:
    """The names of the official CLIP, with its layers' q, k and v in one tensor (model_spec.md 5.4)."""

    def make(folder: Path, weights: Weights) -> Path:
        tensors = plain(weights, dtype)
        made: Tensors = {}
        for name, values in tensors.items():
            short = name.removeprefix("vision_model.")
            if short == "embeddings.class_embedding":
                made["cls_embedding"] = values[None, None]
            elif short == "embeddings.position_embedding.weight":
                made["pos_embedding"] = values[None]
            elif short.startswith("embeddings.patch_embedding."):
                made[short.removeprefix("embeddings.")] = values
            elif short.startswith("pre_layrnorm."):
                made[short.replace("pre_layrnorm", "pre_norm")] = values
            elif ".q_proj." in short:
                three = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                layer, last = short.split(".")[2], short.rpartition(".")[2]
                made[f"transformer.{layer}.attn.to_qkv.{last}"] = torch.cat(three)
            elif ".k_proj." not in short and ".v_proj." not in short:
                for old, new in (
                    ("encoder.layers.", "transformer."),
                    ("layer_norm", "norm"),
                    ("self_attn.out_proj", "attn.proj"),
                    ("mlp.fc1", "mlp.0"),
                    ("mlp.fc2", "mlp.2"),
                ):
                    short = short.replace(old, new)
                made[short] = values
        made = {prefix + name: values for name, values in made.items()}
        others = {"textual.token_embedding.weight": torch.zeros(4, 4), "log_scale": torch.zeros(())}
        if pickle:
            torch.save(made | others, folder / "clip.pth")
            return folder / "clip.pth"
        return saved(folder / "clip_visual_fp16.safetensors", made)

    return make


def beside(other: str, maker: Maker) -> Maker:
    """A file of several models: tensors of another one under the prefix `other`."""

    def make(folder: Path, weights: Weights) -> Path:
        from safetensors.torch import load_file

        path = maker(folder, weights)
        return saved(path, load_file(path) | {f"{other}first.weight": torch.zeros(3)})

    return make


def changed(maker: Maker, change: Callable[[Tensors], Tensors]) -> Maker:
    """The file of another maker with other tensors."""

    def make(folder: Path, weights: Weights) -> Path:
        from safetensors.torch import load_file

        path = maker(folder, weights)
        return saved(path, change(load_file(path)))

    return make
