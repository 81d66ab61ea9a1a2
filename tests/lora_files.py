"""LoRA files in the layouts that people have, at any size, and the deltas that they stand for.

Layouts are those of files_and_loras.md 6 and model_spec.md 6. A delta is computed here in float64 from the
same numbers, rounded to the file's type, by the plain formula: the oracle of runtime/loras/.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import TINY, ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
Array = NDArray[Any]
Spell = Callable[[str], str]

# Outside the blocks, as lightx2v's files have them.
EMBEDDINGS = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
OUTSIDE = (*EMBEDDINGS, "time_projection.1", "img_emb.proj.1", "img_emb.proj.3")


@dataclass
class Made:
    """`tensors` of a file, and the `deltas` at strength 1 by canonical tensor, float64."""

    tensors: dict[str, Array] = field(default_factory=dict)
    deltas: dict[str, Array] = field(default_factory=dict)
    metadata: dict[str, str] | None = None

    def add(self, tensor: str, delta: Array) -> None:
        before = self.deltas.get(tensor)
        self.deltas[tensor] = delta if before is None else before + delta

    def save(self, path: Path) -> Path:
        save_file({k: np.ascontiguousarray(v) for k, v in self.tensors.items()}, path, self.metadata)
        return path


class Maker:
    """Makes factors for the model's layers. `relative` is a delta's size against a weight of unit fan-in."""

    def __init__(
        self, seed: int = 0, model: ModelConfig = TINY, dtype: Any = BF16, relative: float = 0.3
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.model, self.dtype, self.relative = model, np.dtype(dtype), relative
        self.shapes = required_tensors(model, "transformer")
        self.made = Made()

    def linears(self, images: bool = True) -> list[str]:
        """The twelve of each block, or the ten without keys and values of images."""
        names = [
            n.removesuffix(".weight")
            for n, s in self.shapes.items()
            if n.startswith("blocks.") and len(s) == 2
        ]
        return [name for name in names if images or "_img" not in name]

    def norms(self, images: bool = True) -> list[str]:
        names = [
            n.removesuffix(".weight") for n, s in self.shapes.items() if n.endswith(".weight") and len(s) == 1
        ]
        chosen = [name for name in names if name.startswith(("blocks.", "img_emb."))]
        return [name for name in chosen if images or ("_img" not in name and not name.startswith("img_emb"))]

    def numbers(self, shape: tuple[int, ...], deviation: float = 1.0) -> Array:
        values = self.rng.standard_normal(shape) * deviation
        return np.asarray(values, np.float32).astype(self.dtype)

    def shape(self, layer: str) -> tuple[int, int]:
        shape = self.shapes[f"{layer}.weight"]
        return shape[0], math.prod(shape[1:])

    def factors(self, out: int, inner: int, rank: int) -> tuple[Array, Array]:
        """up and down, whose product has the deviation `relative` / sqrt(inner)."""
        up = self.numbers((out, rank), self.relative / math.sqrt(inner * rank))
        return up, self.numbers((rank, inner))

    def pair(
        self,
        layer: str,
        key: str,
        rank: int,
        suffixes: tuple[str, str] = (".lora_up.weight", ".lora_down.weight"),
        alpha: float | None = None,
    ) -> None:
        out, inner = self.shape(layer)
        rank = min(rank, out, inner)
        up, down = self.factors(out, inner, rank)
        self.made.tensors |= {f"{key}{suffixes[0]}": up, f"{key}{suffixes[1]}": down}
        if alpha is not None:
            self.made.tensors[f"{key}.alpha"] = np.array(alpha, self.dtype)
        scale = 1.0 if alpha is None else alpha / rank
        self.made.add(
            f"{layer}.weight", scale * (wide(up) @ wide(down)).reshape(self.shapes[f"{layer}.weight"])
        )

    def whole(self, tensor: str, key: str, deviation: float = 0.05) -> None:
        values = self.numbers(self.shapes[tensor], deviation)
        self.made.tensors[key] = values
        self.made.add(tensor, wide(values))


def wide(values: Array) -> Array:
    return np.asarray(values).astype(np.float64)


# ---- whole files ----


def _lightx2v(maker: Maker, rank: int, images: bool, own: bool, modulation: bool) -> Made:
    """Family A (Kijai's extraction) or B (`own`, of lightx2v: whole deltas for head and patch embedding)."""
    prefix = "diffusion_model."
    outside = [layer for layer in OUTSIDE if images or not layer.startswith("img_emb")]
    low_rank = [*maker.linears(images), *outside, *([] if own else ["head.head"])]
    for layer in low_rank:
        maker.pair(layer, f"{prefix}{layer}", rank)
    for layer in [*low_rank, "patch_embedding", *(["head.head"] if own else [])]:
        maker.whole(f"{layer}.bias", f"{prefix}{layer}.diff_b")
    for layer in maker.norms(images):
        maker.whole(f"{layer}.weight", f"{prefix}{layer}.diff")
        if f"{layer}.bias" in maker.shapes:
            maker.whole(f"{layer}.bias", f"{prefix}{layer}.diff_b")
    if own:
        maker.whole("head.head.weight", f"{prefix}head.head.diff")
        maker.whole("patch_embedding.weight", f"{prefix}patch_embedding.diff", 0.02)
    if modulation:
        for n in range(maker.model.transformer.layers):
            maker.whole(f"blocks.{n}.modulation", f"{prefix}blocks.{n}.diff_m")
        maker.whole("head.modulation", f"{prefix}head.diff_m")
    return maker.made


def lightx2v_kijai(model: ModelConfig = TINY, rank: int = 8) -> Made:
    return _lightx2v(Maker(1, model), rank, images=True, own=False, modulation=False)


def lightx2v_own(model: ModelConfig = TINY, rank: int = 8) -> Made:
    return _lightx2v(Maker(2, model), rank, images=True, own=True, modulation=False)


def high_noise(model: ModelConfig = TINY, rank: int = 8) -> Made:
    return _lightx2v(Maker(3, model), rank, images=False, own=True, modulation=True)


def t2v_kijai(model: ModelConfig = TINY, rank: int = 8) -> Made:
    return _lightx2v(Maker(4, model), rank, images=False, own=False, modulation=False)


def t2v_own(model: ModelConfig = TINY, rank: int = 8) -> Made:
    """Its patch embedding has 16 channels: it stays out with its bias."""
    maker = Maker(5, model)
    made = _lightx2v(maker, rank, images=False, own=True, modulation=False)
    dim, channels = maker.model.transformer.dim, maker.model.transformer.latent_channels
    made.tensors["diffusion_model.patch_embedding.diff"] = maker.numbers((dim, channels, 1, 2, 2), 0.02)
    del made.deltas["patch_embedding.weight"], made.deltas["patch_embedding.bias"]
    return made


def _block_pairs(
    maker: Maker,
    prefix: str,
    suffixes: tuple[str, str] = (".lora_up.weight", ".lora_down.weight"),
    rank: int = 8,
    alpha: Callable[[int], float | None] = lambda i: None,
    images: bool = True,
    spell: Spell = lambda name: name,
    ranks: Callable[[int], int] | None = None,
) -> Made:
    for i, layer in enumerate(maker.linears(images)):
        maker.pair(layer, prefix + spell(layer), ranks(i) if ranks else rank, suffixes, alpha(i))
    return maker.made


AB = (".lora_B.weight", ".lora_A.weight")


def relight_first(model: ModelConfig = TINY, rank: int = 16) -> Made:
    made = _block_pairs(Maker(6, model, F16), "", AB, rank)
    made.metadata = {"format": "pt"}
    return made


def relight(model: ModelConfig = TINY, rank: int = 16) -> Made:
    return _block_pairs(Maker(7, model, F16), "diffusion_model.", rank=rank)


def relight_resized(model: ModelConfig = TINY) -> Made:
    """Another rank for each layer, and alpha = rank, as the resizing script of kohya leaves it."""
    ranks = [1 + i * 7 % 22 for i in range(1000)]
    return _block_pairs(
        Maker(8, model, F16), "diffusion_model.", alpha=lambda i: float(ranks[i]), ranks=ranks.__getitem__
    )


def lightning(model: ModelConfig = TINY) -> Made:
    """alpha 8 of rank 64: a loader that leaves it aside adds eight times too much."""
    maker = Maker(9, model, F16)
    made = _block_pairs(maker, "diffusion_model.", rank=64, alpha=lambda i: 8.0, images=False)
    made.metadata = {"format": "pt"}
    return made


def pusa(model: ModelConfig = TINY) -> Made:
    made = _block_pairs(Maker(10, model), "diffusion_model.", AB, rank=32, images=False)
    made.metadata = {"format": "pt"}
    return made


def underscored(name: str) -> str:
    return name.replace(".", "_")


def kohya(model: ModelConfig = TINY) -> Made:
    return _block_pairs(Maker(11, model, F16), "lora_unet_", alpha=lambda i: 4.0, spell=underscored)


def kohya_fun(model: ModelConfig = TINY) -> Made:
    return _block_pairs(Maker(12, model), "lora_unet__", alpha=lambda i: 8.0, spell=underscored)


def half_kohya(model: ModelConfig = TINY) -> Made:
    return _block_pairs(Maker(13, model), "lora_unet_", alpha=lambda i: 2.0)


def comfy(model: ModelConfig = TINY) -> Made:
    return _block_pairs(Maker(14, model), "model.diffusion_model.", (".lora.up.weight", ".lora.down.weight"))


def diffsynth(model: ModelConfig = TINY) -> Made:
    return _block_pairs(Maker(15, model), "pipe.dit.", (".lora_B.default.weight", ".lora_A.default.weight"))


def peft(model: ModelConfig = TINY) -> Made:
    """Kijai's loader takes this prefix without an alpha for one of rank-stabilised scale."""
    suffixes = (".lora_B.default.weight", ".lora_A.default.weight")
    made = _block_pairs(Maker(16, model, F32), "base_model.model.", suffixes)
    for layer in OUTSIDE:
        Maker.pair(maker := Maker(17, model, F32), layer, f"base_model.model.{layer}", 4, suffixes)
        made.tensors |= maker.made.tensors
        made.deltas |= maker.made.deltas
    return made


def peft_bare(model: ModelConfig = TINY) -> Made:
    return _block_pairs(Maker(18, model), "base_model.model.diffusion_model.", (".lora_B", ".lora_A"))


def to_diffusers(layer: str) -> str:
    """The diffusers name of an official layer (model_spec.md 5.3), written out here a second time."""
    for pattern, to in (
        (r"text_embedding\.(\d)", lambda m: f"condition_embedder.text_embedder.linear_{int(m[1]) // 2 + 1}"),
        (r"time_embedding\.(\d)", lambda m: f"condition_embedder.time_embedder.linear_{int(m[1]) // 2 + 1}"),
        (r"time_projection\.1", lambda m: "condition_embedder.time_proj"),
        (r"img_emb\.proj\.1", lambda m: "condition_embedder.image_embedder.ff.net.0.proj"),
        (r"img_emb\.proj\.3", lambda m: "condition_embedder.image_embedder.ff.net.2"),
        (r"head\.head", lambda m: "proj_out"),
        (r"(blocks\.\d+)\.self_attn\.([qkv])", lambda m: f"{m[1]}.attn1.to_{m[2]}"),
        (r"(blocks\.\d+)\.self_attn\.o", lambda m: f"{m[1]}.attn1.to_out.0"),
        (r"(blocks\.\d+)\.cross_attn\.([qkv])", lambda m: f"{m[1]}.attn2.to_{m[2]}"),
        (r"(blocks\.\d+)\.cross_attn\.o", lambda m: f"{m[1]}.attn2.to_out.0"),
        (r"(blocks\.\d+)\.cross_attn\.([kv])_img", lambda m: f"{m[1]}.attn2.add_{m[2]}_proj"),
        (r"(blocks\.\d+)\.ffn\.0", lambda m: f"{m[1]}.ffn.net.0.proj"),
        (r"(blocks\.\d+)\.ffn\.2", lambda m: f"{m[1]}.ffn.net.2"),
        (r"face_adapter\.fuser_blocks\.(\d)\.linear1_q", lambda m: f"face_adapter.{m[1]}.to_q"),
        (r"face_adapter\.fuser_blocks\.(\d)\.linear2", lambda m: f"face_adapter.{m[1]}.to_out"),
    ):
        if found := re.fullmatch(pattern, layer):
            return str(to(found))
    raise KeyError(layer)


def _with_faces(
    maker: Maker, prefix: str, suffixes: tuple[str, str], spell: Spell = lambda name: name
) -> Made:
    """Diffusers names, and the fuser's keys and values apart, each half of the rows of `linear1_kv`."""
    layers = [*maker.linears(), *OUTSIDE, "head.head"]
    for i in range(maker.model.transformer.fusers):
        layers += [f"face_adapter.fuser_blocks.{i}.{name}" for name in ("linear1_q", "linear2")]
    for layer in layers:
        maker.pair(layer, prefix + spell(to_diffusers(layer)), 4, suffixes)
    for i in range(maker.model.transformer.fusers):
        name = f"face_adapter.fuser_blocks.{i}.linear1_kv.weight"
        rows, inner = maker.shapes[name]
        for half, part in enumerate(("to_k", "to_v")):
            up, down = maker.factors(rows // 2, inner, 4)
            key = prefix + spell(f"face_adapter.{i}.{part}")
            maker.made.tensors |= {f"{key}{suffixes[0]}": up, f"{key}{suffixes[1]}": down}
            delta = np.zeros((rows, inner))
            delta[half * rows // 2 :][: rows // 2] = wide(up) @ wide(down)
            maker.made.add(name, delta)
    return maker.made


def diffusers(model: ModelConfig = TINY) -> Made:
    return _with_faces(Maker(19, model), "transformer.", AB)


def diffusers_old(model: ModelConfig = TINY) -> Made:
    """`lora_linear_layer`, and underscores."""
    suffixes = (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")
    return _with_faces(Maker(20, model), "lora_unet_", suffixes, underscored)


def diffusers_processor(model: ModelConfig = TINY) -> Made:
    """`attn1.processor.to_q_lora.up.weight`."""
    maker = Maker(21, model)
    for layer in maker.linears(images=False):
        if "attn" in layer:
            key = to_diffusers(layer).removesuffix(".0").replace(".to_", ".processor.to_")
            maker.pair(layer, f"transformer.{key}", 4, ("_lora.up.weight", "_lora.down.weight"))
    return maker.made


def loha(model: ModelConfig = TINY) -> Made:
    maker = Maker(22, model)
    for layer in maker.linears():
        out, inner = maker.shape(layer)
        names = [f"lycoris_{underscored(layer)}.hada_w{k}" for k in (1, 2)]
        first, second = maker.factors(out, inner, 4), (maker.numbers((out, 4)), maker.numbers((4, inner)))
        for name, (a, b) in zip(names, (first, second), strict=True):
            maker.made.tensors |= {f"{name}_a": a, f"{name}_b": b}
        maker.made.tensors[f"lycoris_{underscored(layer)}.alpha"] = np.array(2.0, np.float32)
        product = (wide(first[0]) @ wide(first[1])) * (wide(second[0]) @ wide(second[1]))
        maker.made.add(f"{layer}.weight", 2.0 / 4 * product)
    return maker.made


def lokr(model: ModelConfig = TINY) -> Made:
    """The left factor whole, the right one whole or in two; without a rank alpha has no meaning."""
    maker = Maker(23, model)
    for i, layer in enumerate(maker.linears()):
        out, inner = maker.shape(layer)
        key = f"diffusion_model.{layer}"
        left = maker.numbers((8, 4), 1.0)
        maker.made.tensors[f"{key}.lokr_w1"] = left
        maker.made.tensors[f"{key}.alpha"] = np.array(1e10 if i % 2 else 2.0, np.float32)
        if i % 2:
            right = maker.numbers((out // 8, inner // 4), maker.relative / math.sqrt(inner))
            maker.made.tensors[f"{key}.lokr_w2"] = right
            product = np.kron(wide(left), wide(right))
        else:
            up, down = maker.factors(out // 8, inner // 4, 3)
            maker.made.tensors |= {f"{key}.lokr_w2_a": up, f"{key}.lokr_w2_b": down}
            product = 2.0 / 3 * np.kron(wide(left), wide(up) @ wide(down))
        maker.made.add(f"{layer}.weight", product)
    return maker.made


def convolutions(model: ModelConfig = TINY) -> Made:
    """Low rank in a kernel, with and without `lora_mid`; and the patch embedding of 36 channels."""
    maker = Maker(24, model)
    name, tensor = "face_encoder.conv2.conv", "face_encoder.conv2.conv.weight"
    out, channels, taps = maker.shapes[tensor]
    up, down, mid = (
        maker.numbers((out, 4, 1), 0.1),
        maker.numbers((3, channels, 1)),
        maker.numbers((4, 3, taps)),
    )
    maker.made.tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    maker.made.tensors |= {f"{name}.lora_mid.weight": mid, f"{name}.alpha": np.array(6.0, np.float32)}
    core = np.einsum("or,rsk,si->oik", wide(up)[..., 0], wide(mid), wide(down)[..., 0])
    maker.made.add(tensor, 6.0 / 3 * core)
    for name in ("face_encoder.conv3.conv", "patch_embedding"):
        shape = maker.shapes[f"{name}.weight"]
        down = maker.numbers((4, *shape[1:]), 0.1)
        up = maker.numbers((shape[0], 4, *[1] * (len(shape) - 2)), 0.1)
        maker.made.tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        product = wide(up).reshape(shape[0], 4) @ wide(down).reshape(4, -1)
        maker.made.add(f"{name}.weight", product.reshape(shape))
    return maker.made


def odd_deltas(model: ModelConfig = TINY) -> Made:
    """`w_norm`, `b_norm`, the modulation as a tensor of its own, a bias of a PEFT pair with its scale."""
    maker = Maker(25, model, F32)
    for n in range(model.transformer.layers):
        maker.whole(f"blocks.{n}.norm3.weight", f"lora_unet_blocks_{n}_norm3.w_norm")
        maker.whole(f"blocks.{n}.norm3.bias", f"lora_unet_blocks_{n}_norm3.b_norm")
        maker.whole(f"blocks.{n}.modulation", f"diffusion_model.blocks.{n}.modulation.diff")
    maker.whole("head.modulation", "lora_unet_head.diff_m")
    maker.pair("head.head", "head.head", 4, AB, alpha=2.0)
    bias = maker.numbers(maker.shapes["head.head.bias"])
    maker.made.tensors["head.head.lora_B.bias"] = bias
    maker.made.add("head.head.bias", 2.0 / 4 * wide(bias))
    return maker.made


def of_base(kind: str, base: Mapping[str, Array]) -> Made:
    """Deltas that depend on the unchanged weights: `set_weight`, and DoRA by its three conventions."""
    maker = Maker(26, TINY, F32)
    for layer in maker.linears():
        weight = wide(base[f"{layer}.weight"])
        out, inner = weight.shape
        key = f"diffusion_model.{layer}"
        if kind == "set_weight":
            values = maker.numbers((out, inner), 0.1)
            maker.made.tensors[f"{key}.set_weight"] = values
            maker.made.add(f"{layer}.weight", wide(values) - weight)
            continue
        up, down = maker.factors(out, inner, 4)
        maker.made.tensors |= {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down}
        changed = weight + wide(up) @ wide(down)
        if kind == "columns":
            magnitude = maker.numbers((1, inner), 0.1) + np.float32(1)
            norm, name = np.linalg.norm(changed, axis=0, keepdims=True), "dora_scale"
        else:
            magnitude = maker.numbers((out, 1), 0.1) + np.float32(1)
            normed, name = (weight, "dora_scale") if kind == "rows" else (changed, "lora_magnitude_vector")
            norm = np.linalg.norm(normed, axis=1, keepdims=True)
        stored = magnitude if name == "dora_scale" else magnitude.reshape(-1)
        maker.made.tensors[f"{key}.{name}"] = stored
        maker.made.add(f"{layer}.weight", wide(magnitude) / norm * changed - weight)
    return maker.made


FAMILIES: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (
        *(
            lightx2v_kijai,
            lightx2v_own,
            high_noise,
            t2v_kijai,
            t2v_own,
            relight_first,
            relight,
            relight_resized,
        ),
        *(lightning, pusa, kohya, kohya_fun, half_kohya, comfy, diffsynth, peft, peft_bare),
        *(diffusers, diffusers_old, diffusers_processor, loha, lokr, convolutions, odd_deltas),
    )
}
OF_BASE = ("set_weight", "rows", "columns", "magnitude")
