"""LoRAs that this model cannot take, told from their keys: those of other models, and those that need other
graphs.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from trt_wan.engines.config import ModelConfig
from trt_wan.errors import WeightsError
from trt_wan.runtime.loras.names import LONGEST, find_layer, pattern_of, split
from trt_wan.runtime.weights.tensor_file import Entry

MOST_NAMED = 3  # patterns in a message

# A pattern that occurs in some key, and the kind of file.
_UNSUPPORTED = (
    (
        r"[qkv]_loras\.",
        "a Stand-In LoRA, which runs on tokens of a face picture that this model's graphs lack",
    ),
    (r"dwpose_embedding|randomref_embedding", "a UniAnimate LoRA, which needs a pose encoder of its own"),
    (
        r"(?:^|[._])transformer_[12]\.",
        "one file with a LoRA for each expert of Wan2.2-A14B: save one to a file",
    ),
    (r"\.(?:oft_blocks|oft_diag|oft_R|boft_R)", "an OFT or BOFT adapter, which is not supported"),
    (r"\.[ab][12]\.weight$", "a GLoRA adapter, which is not supported"),
    (r"\.reshape_weight$", "a LoRA that enlarges the model's weights, such as a control LoRA"),
)
# The same for other models; a file that has some of this model's layers is not looked up here.
_MODELS = (
    (r"single_transformer_blocks|(?:^|[._])(?:double|single)_blocks", "Flux or HunyuanVideo"),
    (r"(?:^|[._])transformer_blocks", "Qwen-Image, Stable Diffusion 3 or LTX"),
    (r"joint_blocks", "Stable Diffusion 3"),
    (r"(?:input|output|middle|down|up|mid)_blocks?[._]", "Stable Diffusion or SDXL"),
    (r"(?:^|[._])te[123]?[._]|text_encoder|lora_te", "a text encoder"),
    (r"(?:^|[._])layers[._]\d+[._](?:attention|feed_forward)", "Lumina or Z-Image"),
    (r"(?:^|[._])vace_blocks", "Wan VACE"),
)
_WIDTHS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B", 256: "the tiny model"}


def refuse_unsupported(path: Path, keys: Iterable[str]) -> None:
    """Raises WeightsError for a LoRA that cannot be merged into the weights of any model."""
    for key in keys:
        for pattern, what in _UNSUPPORTED:
            if re.search(pattern, key[:LONGEST]):
                raise WeightsError(f"{path} is {what} (it holds {key[-90:]}).", "Leave it out.")


def unknown(path: Path, entries: Mapping[str, Entry]) -> WeightsError:
    """The error for a file without a key of this model."""
    deltas = [key for key in entries if split(key) is not None]
    if not deltas:
        return WeightsError(
            f"{path} is no LoRA: it holds {some_patterns(entries)}.", "Name a LoRA with --lora FILE."
        )
    model = next((name for pattern, name in _MODELS for key in deltas if re.search(pattern, key)), None)
    what = f"a LoRA of {model}" if model else "a LoRA of a model that is not known here"
    return WeightsError(
        f"{path} is {what}: it holds {some_patterns(deltas)}.", "Use a LoRA for Wan 14B, best an I2V one."
    )


def refuse_other_width(path: Path, entries: Mapping[str, Entry], config: ModelConfig) -> None:
    """Raises WeightsError for a LoRA of a Wan model of another width."""
    width = width_of(entries, config)
    if width not in (None, config.transformer.dim):
        raise WeightsError(
            f"{path} is a LoRA of {model_of(width)}, {width} channels wide; this model has "
            f"{config.transformer.dim}.",
            "Use a LoRA for this model.",
        )


def refuse_control(path: Path, entries: Mapping[str, Entry], config: ModelConfig) -> None:
    """Raises WeightsError for a LoRA whose patch embedding takes a control picture."""
    c = config.transformer
    for key, entry in entries.items():
        found = split(key)
        if found is None or found[0] not in ("patch_embedding",) or len(entry.shape) < 2:
            continue
        channels = entry.shape[1]
        if found[1] in ("down", "diff") and channels == 2 * c.latent_channels:
            raise WeightsError(
                f"{path} is a control LoRA: its {key[-90:]} takes {channels} channels, this model "
                f"{c.latent_channels + c.condition_channels}.",
                "Leave it out.",
            )


def width_of(entries: Mapping[str, Entry], config: ModelConfig) -> int | None:
    """The input channels of the first low-rank pair of a self-attention; None without one."""
    for key, entry in entries.items():
        found = split(key)
        if found is None or found[1] not in ("down", "hada_w1_b") or len(entry.shape) < 2:
            continue
        layer = find_layer(config, *found)
        if layer is not None and re.search(r"self_attn\.[qkvo]$", layer.name):
            return entry.shape[1]
    return None


def model_of(width: int | None) -> str:
    return _WIDTHS.get(width or 0, "a model of another size")


def some_patterns(keys: Iterable[str]) -> str:
    """The first patterns of keys, and how many more there are."""
    patterns = list(dict.fromkeys(pattern_of(key)[-60:] for key in keys))
    if not patterns:
        return "nothing"
    more = f" and {len(patterns) - MOST_NAMED} more" if len(patterns) > MOST_NAMED else ""
    return f"{', '.join(patterns[:MOST_NAMED])}{more}"
