"""Describes a checkpoint file: part, layout, types, quantisation, missing and unexpected tensors.

Only headers and scales are read.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.checkpoint import SPOKEN, Checkpoint, by_pattern, summarised
from trt_wan.runtime.weights.load import bytes_of, closest_model
from trt_wan.runtime.weights.open_file import kind_of, open_file
from trt_wan.runtime.weights.recognition.encodings import encoding_of
from trt_wan.runtime.weights.recognition.quantised import KNOWN
from trt_wan.runtime.weights.recognition.twins import is_qwen_vae
from trt_wan.runtime.weights.tensor_file import SUFFIXES

UNKNOWN = "a file of another kind"
UNUSED = (
    ".kernel",
    ".position_ids",
    "visual_projection.weight",
    "spiece_model",
)  # tensors that files have beside the needed ones


@dataclass(frozen=True)
class Description:
    """`what` names the file in a sentence. Without `part` it is no file of this model. `problem` is the
    sentence that refuses it; without one it can be used.
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
    missing: str
    unexpected: str
    problem: str


def describe(path: Path) -> Description:
    """`path` is a file, an index, one of several shards, or a folder with one of these. In a file of several
    parts the first is described and the others are named. Raises WeightsError for a file that does not open.
    """
    path = _inside(path) if path.is_dir() else path
    file = open_file(path)
    found = [one for part in PARTS if (one := Checkpoint(path, part, file)).layout is not None]
    others = [one.layout.part for one in found[1:] if one.layout]
    return _described(found[0] if found else Checkpoint(path, None, file), tuple(others))


def _inside(folder: Path) -> Path:
    """The index of a folder, or its only checkpoint."""
    indexes = sorted(folder.glob("*.index.json"))
    files = indexes or sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) != 1 and not indexes:
        raise WeightsError(f"{folder} holds {len(files)} checkpoints.", "Name one of its files.")
    return files[0]


def _described(checkpoint: Checkpoint, others: tuple[Part, ...]) -> Description:
    layout, entries = checkpoint.layout, checkpoint.file.entries
    part = layout.part if layout else None
    own = [name for place in checkpoint.places.values() for name in place.stored]
    model = closest_model(checkpoint, part) if part else None
    wanted = required_tensors(model, part) if model and part else {}
    faults = {name: fault for name, shape in wanted.items() if (fault := checkpoint.fault(name, shape))}
    known = [name for name in wanted if name in checkpoint.places]
    prefix = f", prefix {checkpoint.prefix}" if checkpoint.prefix else ""
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
        missing=summarised(faults, len(wanted)) if faults else "",
        unexpected=_unexpected(checkpoint, wanted),
        problem=_problem(checkpoint, part, model),
    )


def _unexpected(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Tensors that no network reads and no known file of the part has, by pattern."""
    if not wanted:
        return ""
    left = [
        name
        for name in checkpoint.places
        if name not in wanted and name.rpartition(".")[2] not in KNOWN[2:] and not name.endswith(UNUSED)
    ]
    return by_pattern(left)


def _problem(checkpoint: Checkpoint, part: Part | None, model: ModelConfig | None) -> str:
    if part is None or model is None:
        return f"{checkpoint.path} is {checkpoint.what() or UNKNOWN}, and no part of Wan2.2-Animate."
    try:
        checkpoint.require(required_tensors(model, part), part)
    except WeightsError as error:
        return error.message
    if part == "vae" and is_qwen_vae(checkpoint):
        return f"{checkpoint.path} is the VAE of Qwen-Image, not {SPOKEN[part][0]}."
    return ""
