"""Describes a checkpoint file: part, layout, types, quantisation, missing and unexpected tensors.

Only headers and scales are read.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.checkpoint import OPTIONAL_PARTS, PARTS
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.checkpoint import MISSING, SPOKEN, Checkpoint, by_pattern, summarised
from trt_wan.runtime.weights.find_files import checkpoint_in
from trt_wan.runtime.weights.load import bytes_of, closest_model
from trt_wan.runtime.weights.needed import needed
from trt_wan.runtime.weights.open_file import kind_of, open_file
from trt_wan.runtime.weights.recognition.encodings import encoding_of
from trt_wan.runtime.weights.recognition.quantised import KNOWN
from trt_wan.runtime.weights.recognition.twins import is_qwen_vae

UNKNOWN = "a file of another kind"
SAM2 = "SAM2"  # a name in kinds.OTHERS
UNUSED = (
    ".kernel",
    ".position_ids",
    "visual_projection.weight",
    "spiece_model",
)  # tensors that files have beside the needed ones


MASK_BRANCH = "controlnet_mask_embedding."  # Uni3C's file has it, and no program feeds it


@dataclass(frozen=True)
class Description:
    """`what` names the file in a sentence. Without `part` it is no part of this model. `problem` is the
    sentence that refuses it; without one it can be used, as a part or as SAM2.
    """

    path: Path
    what: str
    part: Part | None
    others: tuple[Part, ...]  # parts that the file holds too
    model: str  # 14b or tiny
    layout: str  # safetensors, gguf or torch; the names; the prefix
    encoding: str  # the type of most numbers, such as "scaled F8_E4M3"
    types: Mapping[str, int]  # tensors by type
    tensors: int
    parameters: int
    bytes: int
    quantised: int  # tensors in FP8, int8 or GGUF blocks
    missing: str  # tensors
    wrong: str  # tensors of another shape, of an unknown type or scale, …
    unexpected: str
    problem: str
    hint: str  # for the problem


def describe(path: Path) -> Description:
    """`path` is a file, an index, one of several shards, or a folder with one of these. In a file of several
    parts the first is described and the others are named. Raises WeightsError for a file that does not open.
    """
    path = checkpoint_in(path) if path.is_dir() else path
    file = open_file(path)
    found = [
        one for part in (*PARTS, *OPTIONAL_PARTS) if (one := Checkpoint(path, part, file)).layout is not None
    ]
    others = [one.layout.part for one in found[1:] if one.layout]
    return _described(found[0] if found else Checkpoint(path, None, file), tuple(others))


def _described(checkpoint: Checkpoint, others: tuple[Part, ...]) -> Description:
    layout, entries = checkpoint.layout, checkpoint.file.entries
    part = layout.part if layout else None
    own = [name for place in checkpoint.places.values() for name in place.stored]
    model = closest_model(checkpoint, part) if part else None
    wanted = needed(checkpoint, model, part) if model and part else {}
    faults = {name: fault for name, shape in wanted.items() if (fault := checkpoint.fault(name, shape))}
    missing = {name: fault for name, fault in faults.items() if fault.kind == MISSING}
    known = [name for name in wanted if name in checkpoint.places]
    prefix = f", prefix {checkpoint.prefix}" if checkpoint.prefix else ""
    problem, hint = _problem(checkpoint, part, model)
    return Description(
        path=checkpoint.path,
        what=checkpoint.what() or UNKNOWN,
        part=part,
        others=others,
        model=model.name if model else "",
        layout=f"{kind_of(checkpoint.path)}, {layout.name}{prefix}" if layout else kind_of(checkpoint.path),
        encoding=encoding_of(checkpoint, known or checkpoint.places),
        types=dict(Counter(entries[name].dtype for name in own).most_common()),
        tensors=len(own),
        parameters=sum(math.prod(checkpoint.shape(name)) for name in known or checkpoint.places),
        bytes=bytes_of(checkpoint),
        quantised=sum(
            checkpoint.quantised.is_quantised(n) for name in known for n in checkpoint.places[name].stored
        ),
        missing=summarised(missing, len(wanted)),
        wrong=summarised({n: f for n, f in faults.items() if n not in missing}, len(wanted)),
        unexpected=_unexpected(checkpoint, wanted),
        problem=problem,
        hint=hint,
    )


def _unexpected(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Tensors that no network reads and no known file of the part has, by pattern."""
    if not wanted:
        return ""
    left = [
        name
        for name in checkpoint.places
        if name not in wanted
        and name.rpartition(".")[2] not in KNOWN[2:]
        and not name.endswith(UNUSED)
        and not name.startswith(MASK_BRANCH)
    ]
    return by_pattern(left)


def _problem(checkpoint: Checkpoint, part: Part | None, model: ModelConfig | None) -> tuple[str, str]:
    """The sentence and the hint; empty for a file that can be used."""
    if part is None or model is None:
        if checkpoint.what() == SAM2:
            return "", ""
        what = f"{checkpoint.path} is {checkpoint.what() or UNKNOWN}, and no part of Wan2.2-Animate."
        return what, "A run takes the transformer, the VAE, umT5, CLIP, Uni3C, SAM2 and LoRAs."
    try:
        checkpoint.require(needed(checkpoint, model, part), part)
    except WeightsError as error:
        return error.message, error.hint
    if part == "vae" and is_qwen_vae(checkpoint):
        spoken, hint = SPOKEN[part]
        return f"{checkpoint.path} is the VAE of Qwen-Image, not {spoken}.", hint
    return "", ""
