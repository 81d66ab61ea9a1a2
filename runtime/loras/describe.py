"""Describes a LoRA file by its header and its alphas: family, ranks, the parts that it changes, the model."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from trt_wan.engines.config import MODELS
from trt_wan.errors import WeightsError
from trt_wan.runtime.loras.families import DORA, LOHA, LOKR
from trt_wan.runtime.loras.lora_file import LoraFile, open_lora
from trt_wan.runtime.loras.names import pattern_of
from trt_wan.runtime.loras.refusals import width_of
from trt_wan.runtime.weights.open_file import open_file

# Parts of the transformer by the names of their tensors; the first that matches.
PARTS = (
    (r"^face_|^motion_encoder", "faces"),
    (r"modulation$", "modulation"),
    (r"\.norm|norm_|img_emb\.proj\.[04]\.", "norms"),
    (r"\.bias$", "biases"),
    (r"self_attn", "self-attention"),
    (r"_img\.", "attention to the image"),
    (r"cross_attn", "attention to the text"),
    (r"\.ffn\.", "feed-forward"),
    (r"patch_embedding", "patch embedding"),
    (r"^head", "head"),
    ("", "embeddings"),
)


@dataclass(frozen=True)
class LoraDescription:
    """`ranks` and `alphas` count layers, `parts` the model's tensors, all else keys."""

    path: Path
    family: str
    example: str  # the pattern of a key
    model: str  # a name of engines.config.MODELS
    ranks: Counter[int]
    alphas: Counter[float]  # empty: scale 1
    parts: Counter[str]
    types: Counter[str]
    unmatched: Counter[str]  # keys that match nothing, by pattern
    skipped: int  # keys for inputs that the model has not
    bytes: int
    tensors: int = field(default=0)


def describe_lora(path: Path) -> LoraDescription:
    """Raises WeightsError that names a file which is no LoRA, or one of another model."""
    file = open_file(path)
    of_width = [m for m, config in MODELS.items() if width_of(file, config) == config.transformer.dim]
    errors = []
    for model in dict.fromkeys((*of_width, *MODELS)):
        try:
            return _described(open_lora(path, MODELS[model]), model)
        except WeightsError as error:
            errors.append(error)
    raise errors[0]


def _described(lora: LoraFile, model: str) -> LoraDescription:
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    for group in lora.groups:
        if (rank := group.rank) is not None:
            ranks[rank] += 1
        if (alpha := group.alpha) is not None:
            alphas[alpha] += 1
    parts = Counter(_part_of(name) for name in lora.changes())
    keys = [key for group in lora.groups for key in group.keys.values()]
    return LoraDescription(
        path=lora.path,
        family=_family(lora),
        example=pattern_of(keys[0]),
        model=model,
        ranks=ranks,
        alphas=alphas,
        parts=parts,
        types=Counter(entry.dtype for entry in lora.file.values()),
        unmatched=lora.unmatched,
        skipped=len(lora.skipped),
        bytes=lora.path.stat().st_size,
        tensors=len(lora.file),
    )


def _family(lora: LoraFile) -> str:
    roles = {role for group in lora.groups for role in group.keys}
    names = (
        ("DoRA", DORA),
        ("LoHa", LOHA),
        ("LoKr", LOKR),
        ("low rank", ("down",)),
        ("whole deltas", ("diff", "diff_b", "diff_m", "set_weight")),
    )
    found = [name for name, members in names if roles & set(members)]
    return " and ".join(found if "DoRA" not in found else [name for name in found if name != "low rank"])


def _part_of(tensor: str) -> str:
    return next(part for pattern, part in PARTS if re.search(pattern, tensor))
