"""The scale of PEFT's adapters, which keep alpha outside of the tensors: in `adapter_config.json` beside
`adapter_model.safetensors`, and in files of diffusers in the header's `lora_adapter_metadata`.

As PEFT: alpha / rank, or alpha / sqrt(rank) with `use_rslora`. `alpha_pattern` and `rank_pattern` name layers
by regular expressions that match the end of a layer's name, the first one that does.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trt_wan.errors import WeightsError, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model."
METADATA, PREFIX = "lora_adapter_metadata", "transformer."  # diffusers' names
LARGEST = 1 << 20  # bytes of the file
KINDS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # by `peft_type`: the name of alpha
CHANGED_BASE = ("pissa", "olora", "corda")  # these initialisations change the model's own weights
# Expressions with two repetitions at most: others may compute for hours.
SAFE = re.compile(r"(?:[\w.^|-]|\\[.d]|\[\d-\d\]|(?:\.\*|\\d\+)(?!.*(?:\.\*|\\d\+).*(?:\.\*|\\d\+)))*")
LONGEST = 200  # characters of an expression

Value = TypeVar("Value")


@dataclass(frozen=True)
class PeftConfig:
    path: Path  # the file that says so
    alpha: float
    rank: int
    alphas: Mapping[str, float]  # by pattern
    ranks: Mapping[str, int]
    by_root: bool  # alpha / sqrt(rank)

    def alpha_of(self, layer: str) -> float:
        return _matching(self.alphas, layer, self.alpha)

    def scale(self, layer: str, rank: int | None) -> float:
        """`layer` is its name in PEFT's model, `rank` that of the tensors. Raises WeightsError if the ranks
        differ: the settings are those of another file.
        """
        wanted = _matching(self.ranks, layer, self.rank)
        if rank not in (None, wanted):
            raise _refused(
                self.path, f"has rank {wanted} for {shown(layer)}, and the LoRA beside it has {rank}"
            )
        return self.alpha_of(layer) / (math.sqrt(wanted) if self.by_root else wanted)


def find_config(lora: Path, metadata: Mapping[str, object]) -> PeftConfig | None:
    """The settings of a LoRA file with this header; None where it has none. Raises WeightsError."""
    if isinstance(text := metadata.get(METADATA), str):
        described = _parsed(lora, text.encode(errors="surrogateescape"))
        own = {key.removeprefix(PREFIX): value for key, value in described.items() if key.startswith(PREFIX)}
        return _config(lora, own) if own else None
    if (file := config_file(lora)) is None:
        return None
    try:
        if file.stat().st_size > LARGEST:
            raise _refused(file, "is too long")
        return _config(file, _parsed(file, file.read_bytes()))
    except OSError as error:
        raise _refused(file, f"cannot be read ({error.strerror})") from error


def config_file(lora: Path) -> Path | None:
    """The adapter_config.json beside a file with PEFT's name."""
    file = lora.with_name(CONFIG)
    return file if lora.name.startswith(WEIGHTS) and file.is_file() else None


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise _refused(path, "has settings of PEFT that are no JSON object")
    return described


def _config(path: Path, described: Mapping[str, Any]) -> PeftConfig:
    kind = described.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in KINDS:
        raise _refused(path, f"has the peft_type {shown(kind)}, which is not supported")
    start = described.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise _refused(path, f"has init_lora_weights {shown(start)}, which changes the model's own weights")
    if described.get("fan_in_fan_out"):
        raise _refused(path, "has fan_in_fan_out, which no layer of this model has")
    rank, alpha = described.get("r", 8), described.get(KINDS[kind], 8)  # PEFT's own defaults
    ranks, alphas = described.get("rank_pattern") or {}, described.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise _refused(path, "has a pattern that is no JSON object")
    for pattern in (*ranks, *alphas):
        if len(pattern) > LONGEST or not SAFE.fullmatch(pattern):
            raise _refused(path, f"has the pattern {shown(pattern)}, which is not supported")
    if not all(type(number) is int and 0 < number < 1 << 31 for number in (rank, *ranks.values())):
        raise _refused(path, "has a rank that is no positive number")
    if not all(_is_positive(number) for number in (alpha, *alphas.values())):
        raise _refused(path, "has an alpha that is no positive number")
    return PeftConfig(path, alpha, rank, alphas, ranks, bool(described.get("use_rslora")))


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and type(number) is not bool and 0 < number < 1e30


def _matching(patterns: Mapping[str, Value], layer: str, otherwise: Value) -> Value:
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(found, otherwise)


def _refused(path: Path, fault: str) -> WeightsError:
    return WeightsError(
        f"{path} {fault}.", "Use a LoRA with its alpha inside, or convert it again with PEFT."
    )
