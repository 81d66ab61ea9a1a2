"""Keys of LoRA files: the layer that a key is about, and the role of its numbers there.

A key is a prefix, a layer and a suffix: `diffusion_model.` `blocks.0.self_attn.q` `.lora_up.weight`. The
suffix says the role; the layer is looked up under the official, the diffusers and the wrapper's name, with
dots or with underscores (model_spec.md 5.3 and 6, files_and_loras.md 6).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import ModelConfig

PEFT_PREFIX = "base_model.model."
PREFIXES = (
    *(PEFT_PREFIX, "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit."),
    *("lora_unet__", "lora_unet_", "lycoris_", "model."),
)
LONGEST = 300  # letters of a key; a damaged file may have a million
_ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # PEFT's name of an adapter, mostly `default`
_UP = r"(?:\.lora_(?:up|B)|[._]lora\.up|\.lora_linear_layer\.up)"
_DOWN = r"(?:\.lora_(?:down|A)|[._]lora\.down|\.lora_linear_layer\.down)"
_SUFFIXES = tuple(
    (re.compile(rf"{pattern}$"), role)
    for pattern, role in (
        (rf"{_UP}{_ADAPTER}\.bias", "up_bias"),
        (rf"{_UP}{_ADAPTER}(?:\.weight)?", "up"),
        (rf"{_DOWN}{_ADAPTER}(?:\.weight)?", "down"),
        (r"\.lora_mid(?:\.weight)?", "mid"),
        (r"\.alpha", "alpha"),
        (r"\.(?:diff|w_norm)", "diff"),
        (r"\.(?:diff_b|b_norm)", "diff_b"),
        (r"\.diff_m", "diff_m"),
        (r"\.set_weight", "set_weight"),
        (r"\.dora_scale", "dora_scale"),
        (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
        (r"\.(?P<part>hada_(?:w[12]_[ab]|t[12]))", ""),
        (r"\.(?P<part>lokr_(?:w[12](?:_[ab])?|t2))", ""),
    )
)
# The diffusers name of a layer, from the official one (model_spec.md 5.3).
_DIFFUSERS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
        (r"^time_projection\.1$", "condition_embedder.time_proj"),
        (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
        (r"^img_emb\.proj\.0$", "condition_embedder.image_embedder.norm1"),
        (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
        (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
        (r"^img_emb\.proj\.4$", "condition_embedder.image_embedder.norm2"),
        (r"^head\.head$", "proj_out"),
        (r"^head\.modulation$", "scale_shift_table"),
        (r"\.modulation$", ".scale_shift_table"),
        (r"\.norm3$", ".norm2"),
        (r"\.ffn\.0$", ".ffn.net.0.proj"),
        (r"\.ffn\.2$", ".ffn.net.2"),
        (r"\.cross_attn\.k_img$", ".attn2.add_k_proj"),
        (r"\.cross_attn\.v_img$", ".attn2.add_v_proj"),
        (r"\.cross_attn\.norm_k_img$", ".attn2.norm_added_k"),
        (r"\.self_attn\.", ".attn1."),
        (r"\.cross_attn\.", ".attn2."),
        (r"(\.attn[12])\.([qkv])$", r"\1.to_\2"),
        (r"(\.attn[12])\.o$", r"\1.to_out.0"),
        (r"^face_encoder\.(\w+)\.conv$", r"face_encoder.\1"),
        (r"^face_adapter\.fuser_blocks\.(\d+)\.linear1_q$", r"face_adapter.\1.to_q"),
        (r"^face_adapter\.fuser_blocks\.(\d+)\.linear2$", r"face_adapter.\1.to_out"),
        (r"^face_adapter\.fuser_blocks\.(\d+)\.([qk])_norm$", r"face_adapter.\1.norm_\2"),
        (r"^motion_encoder\.enc\.fc\.", "motion_encoder.motion_network."),
    )
)


@dataclass(frozen=True)
class Layer:
    """A layer by its official name, without `.weight`, or a parameter that belongs to none (`modulation`).

    `half` is 0 or 1 for the rows of keys and those of values in `linear1_kv`, which diffusers keeps apart.
    """

    name: str
    half: int | None = None


def split(key: str) -> tuple[str, str] | None:
    """The layer as the key spells it, without prefixes, and the role; None for a key that is not a LoRA's."""
    if len(key) > LONGEST:
        return None
    for pattern, role in _SUFFIXES:
        if (found := pattern.search(key)) is not None:
            return _without_prefixes(key[: found.start()]), role or found["part"]
    return None


def module_of(key: str) -> str:
    """The layer of a key that is a LoRA's, as PEFT names it in its model."""
    found = next(found for pattern, _ in _SUFFIXES if (found := pattern.search(key)))
    return key[: found.start()].removeprefix(PEFT_PREFIX)


def _without_prefixes(stem: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if stem.startswith(prefix)), ""):
        stem = stem.removeprefix(prefix)
    return stem.replace(".processor.", ".")


@cache
def layers(config: ModelConfig) -> Mapping[str, Layer]:
    """Every layer of the transformer by each of its names."""
    found: dict[str, Layer] = {}
    for tensor in required_tensors(config, "transformer"):
        layer = tensor.removesuffix(".weight").removesuffix(".bias")
        for name, known in _names(layer, config):
            for spelled in (name, name.replace(".", "_")):
                assert found.setdefault(spelled, known) == known, f"{spelled} is the name of two layers"
    return found


def _names(layer: str, config: ModelConfig) -> Iterator[tuple[str, Layer]]:
    yield layer, Layer(layer)
    renamed = layer
    for pattern, replacement in _DIFFUSERS:
        renamed = pattern.sub(replacement, renamed)
    if renamed != layer:
        yield renamed, Layer(layer)
        if renamed.endswith(".to_out.0"):
            yield renamed.removesuffix(".0"), Layer(layer)
    if found := re.fullmatch(r"face_adapter\.fuser_blocks\.(\d+)\.(\w+)", layer):
        block = int(found[1]) * config.transformer.fuser_interval
        yield f"blocks.{block}.fuser_block.{found[2]}", Layer(layer)
        if found[2] == "linear1_kv":
            yield f"face_adapter.{found[1]}.to_k", Layer(layer, 0)
            yield f"face_adapter.{found[1]}.to_v", Layer(layer, 1)


def find_layer(config: ModelConfig, stem: str, role: str) -> Layer | None:
    """The layer of a stem from `split`. `blocks.7` with the role `diff_m` is the modulation of block 7."""
    known = layers(config)
    stems = (f"{stem}.modulation", f"{stem}_modulation", stem) if role == "diff_m" else (stem,)
    return next((known[spelled] for spelled in stems if spelled in known), None)


def pattern_of(key: str) -> str:
    """The key with N for every number, to count keys that differ in nothing else."""
    return re.sub(r"\d+", "N", key[:LONGEST])
