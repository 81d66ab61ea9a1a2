"""Checkpoint files to canonical float32 tensors: names, scales and types as people have them, checked before
use.

Everything wrong with a file is found from the header and the scales alone and told in one sentence. Values
are converted to float32 when asked for, one tensor at a time.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.contract import Part
from trt_wan.errors import LONGEST_MESSAGE, WeightsError
from trt_wan.runtime.weights.open_file import OpenFile, open_file
from trt_wan.runtime.weights.recognition.kinds import other_model
from trt_wan.runtime.weights.recognition.layouts import (
    LAYOUTS,
    Layout,
    Place,
    find_layout,
    places,
    same_but_ones,
)
from trt_wan.runtime.weights.recognition.quantised import Fault, Quantised
from trt_wan.runtime.weights.stored import BLOCKS, Stored
from trt_wan.runtime.weights.tensor_file import Entry

MISSING, SHAPE = "are missing", "have another shape"
MOST_KINDS = 3  # a message names so many kinds of faults at most
# The name of a part in a sentence, and files that hold it.
SPOKEN: dict[Part, tuple[str, str]] = {
    "transformer": (
        "the transformer of Wan2.2-Animate",
        "Use wan2.2_animate_14B in bf16, scaled FP8, int8 or GGUF, or the official or diffusers files.",
    ),
    "vae": (
        "the VAE of Wan2.1",
        "Use wan_2.1_vae.safetensors, Wan2_1_VAE_bf16.safetensors or Wan2.1_VAE.pth.",
    ),
    "text_encoder": (
        "the text encoder umT5-xxl",
        "Use umt5_xxl_fp8_e4m3fn_scaled.safetensors, umt5-xxl-enc-bf16.safetensors or the official .pth.",
    ),
    "image_encoder": (
        "the image encoder CLIP ViT-H/14",
        "Use clip_vision_h.safetensors or the official open-clip .pth.",
    ),
    "camera_control": (
        "the camera control Uni3C",
        "Use Wan21_Uni3C_controlnet_fp16.safetensors of Kijai/WanVideo_comfy.",
    ),
    "lynx_resampler": (
        "the resampler of Lynx",
        "Use lynx_full_resampler_fp32.safetensors or lynx_lite_resampler_fp32.safetensors.",
    ),
    "lynx_ip": (
        "the IP adapter of Lynx",
        "Use Wan2_1-T2V-14B-Lynx_full_ip_layers_fp16.safetensors or the lite one.",
    ),
    "lynx_ref": (
        "the ref adapter of Lynx",
        "Use Wan2_1-T2V-14B-Lynx_full_ref_layers_fp16.safetensors.",
    ),
}


class Checkpoint(Mapping[str, NDArray[np.float32]]):
    """The `Tensors` of one part in a file. Values are read when a tensor is asked for.

    After `require` tensors have the shapes that the model needs. Layouts leave out dimensions of 1.
    """

    def __init__(self, path: Path, part: Part | None = None, file: OpenFile | None = None) -> None:
        """`part` is the one to look for in a file that holds several; None: any. `file` is the open file."""
        self.path, self.file = path, file or open_file(path)
        found = find_layout(self.file.entries, part)
        self.layout: Layout | None = found[0] if found else None
        self.prefix = found[1] if found else ""
        self.places = places(self.file.entries, self.layout or LAYOUTS[0], self.prefix)
        self.quantised = Quantised(self.file, {n for place in self.places.values() for n in place.stored})
        self._shapes: Mapping[str, tuple[int, ...]] = {}

    def stored(self, name: str) -> Stored:
        """The tensor as it lies in the file; the motion encoder's ORTHONORMAL is computed."""
        if name == ORTHONORMAL:
            return Stored(orthonormal(self[DIRECTION]))
        place = self.places[name]
        shape = self._shapes.get(name, self.shape(name))
        pieces = [self._stored(stored) for stored in place.stored]
        if len(pieces) > 1:
            return _shaped(_joined(pieces), shape)
        return _shaped(_cut(pieces[0], place) if place.pieces > 1 else pieces[0], shape)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.stored(name).float32()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.places or (name == ORTHONORMAL and DIRECTION in self.places)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        """Some rows of a table; the other rows are not read."""
        return self.stored(name).rows(indices)

    def raw(self, name: str) -> NDArray[np.generic]:
        """The stored values of a tensor that is not a weight, such as an embedded tokenizer."""
        return self.file.read(self.places[name].stored[0])

    def entry(self, name: str) -> Entry:
        """The header's entry of a tensor, or of its first piece."""
        return self.file.entries[self.places[name].stored[0]]

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored."""
        place = self.places[name]
        first, *inner = self.entry(name).shape or (1,)
        if len(place.stored) > 1:
            return (sum(self.file.entries[stored].shape[0] for stored in place.stored), *inner)
        return (first // place.pieces, *inner) if place.pieces > 1 else self.entry(name).shape

    def require(self, tensors: Mapping[str, tuple[int, ...]], part: Part | None = None) -> None:
        """Raises WeightsError that says how many of `tensors` are missing, have another shape, or cannot be
        read, with an example each. A file of another model is named as that.
        """
        part = part or (self.layout.part if self.layout else "transformer")
        faults = {name: fault for name, shape in tensors.items() if (fault := self.fault(name, shape))}
        if not faults:
            self._shapes = tensors
            return
        spoken, hint = SPOKEN[part]
        if foreign := self.quantised.foreign():
            raise WeightsError(f"{self.path} is quantised for {foreign}, which is not supported.", hint)
        if (self.layout is None or self.layout.part != part) and (what := self.what()):
            raise WeightsError(f"{self.path} is {what}, not {spoken}.", hint)
        text = f"{self.path} does not fit as {spoken}: "
        room = LONGEST_MESSAGE - 1 - len(text)
        raise WeightsError(f"{text}{summarised(faults, len(tensors), room)}.", hint)

    def what(self) -> str:
        """The model that the file holds, for a sentence; nothing if it is not known."""
        found = find_layout(self.file.entries)
        if found is not None:
            return SPOKEN[found[0].part][0]
        return other_model({name: entry.shape for name, entry in self.file.entries.items()})

    def fault(self, name: str, shape: tuple[int, ...]) -> Fault | None:
        """The fault of a tensor that should have `shape`; None for a good one."""
        if name not in self.places:
            return Fault(MISSING)
        for stored in self.places[name].stored:
            if fault := self.quantised.fault(stored):
                return fault
        found = self.shape(name)
        if not same_but_ones(found, shape):
            return Fault(SHAPE, f"{list(found)} instead of {list(shape)}")
        return None

    def _stored(self, name: str) -> Stored:
        """A stored tensor with all that its siblings do to it."""
        entry, values = self.file.entries[name], self.file.read(name)
        blocks = entry.dtype if entry.dtype in BLOCKS else ""
        file: Path | None = entry.file
        if not values.flags.c_contiguous:  # a transposed tensor of a .pth
            values, file = np.ascontiguousarray(values), None
        if entry.dtype == "F64":
            values, file = values.astype(np.float32), None
        stored = Stored(
            values,
            self.quantised.scales(name),
            file,
            entry.start,
            self.quantised.rotation(name),
            blocks,
            entry.shape,
        )
        columns = self.quantised.columns(name)
        return stored if columns is None else Stored(stored.float32() * columns)


def _joined(pieces: Sequence[Stored]) -> Stored:
    """Tensors of the same columns, one below the other, in memory."""
    first = pieces[0]
    if any((p.encoding, p.rotation) != (first.encoding, first.rotation) for p in pieces):
        return Stored(np.concatenate([piece.float32() for piece in pieces]))
    scales = None
    if any(piece.scales is not None for piece in pieces):
        ones = [np.ones(p.shape[0], np.float32) if p.scales is None else p.scales for p in pieces]
        scales = np.concatenate(ones)
    values = np.concatenate([piece.values for piece in pieces])
    shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
    return Stored(values, scales, None, 0, first.rotation, first.blocks, shape)


def _cut(whole: Stored, place: Place) -> Stored:
    """One of equal parts along rows; its bytes follow each other in the file."""
    rows = whole.shape[0] // place.pieces
    part = slice(place.piece * rows, (place.piece + 1) * rows)
    values = whole.values[part]
    scales = None if whole.scales is None else whole.scales[part]
    start = whole.start + place.piece * values.nbytes
    return Stored(values, scales, whole.file, start, whole.rotation, whole.blocks, (rows, *whole.shape[1:]))


def _shaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    """The same with the dimensions of 1 that the model has."""
    if stored.shape == shape:
        return stored
    if stored.scales is not None and stored.shape[:1] != shape[:1]:  # scales are those of the first dimension
        return Stored(stored.float32().reshape(shape))
    values = stored.values.reshape(shape[0], -1) if stored.blocks else stored.values.reshape(shape)
    return Stored(values, stored.scales, stored.file, stored.start, stored.rotation, stored.blocks, shape)


def summarised(faults: Mapping[str, Fault], total: int, room: int = LONGEST_MESSAGE) -> str:
    """A sentence about faults by tensor: how many of each kind, most first, and an example by pattern. As
    many kinds as fit into `room` characters, and one at least.
    """
    kinds: dict[str, list[str]] = {}
    for name, fault in faults.items():
        kinds.setdefault(fault.kind, []).append(name)
    told: list[str] = []
    for kind, names in sorted(kinds.items(), key=lambda item: -len(item[1])):
        of = f" of {total} tensors" if not told else ""
        verb, _, rest = kind.partition(" ")
        verb = {"are": "is", "have": "has"}[verb] if len(names) == 1 else verb
        example, alike = _patterns(names)[0]
        detail = faults[alike[0]].detail
        clause = f"{len(names)}{of} {verb} {rest}, such as {example}{detail and f' ({detail})'}"
        if told and (len(told) == MOST_KINDS or len("; ".join((*told, clause))) > room - 16):
            break
        told.append(clause)
    if len(kinds) > len(told):
        told.append(f"{len(kinds) - len(told)} other faults")
    return "; ".join(told)


def by_pattern(names: Sequence[str]) -> str:
    """Names in a sentence: how many there are of each pattern."""
    patterns = _patterns(names)
    told = [f"{len(alike)} like {one}" if len(alike) > 1 else one for one, alike in patterns[:MOST_KINDS]]
    more = f" and {len(patterns) - MOST_KINDS} other kinds" if len(patterns) > MOST_KINDS else ""
    return ", ".join(told) + more


def _patterns(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names that differ in their first number, which becomes *, most first. A name that is alone stays."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\d+", "*", name, count=1), []).append(name)
    told = [(pattern if len(alike) > 1 else alike[0], alike) for pattern, alike in found.items()]
    return sorted(told, key=lambda one: -len(one[1]))


def orthonormal(direction: NDArray[np.float32]) -> NDArray[np.float32]:
    """Q of the Householder QR with LAPACK's signs: others silently break expressions (model_spec.md 1.6)."""
    return np.linalg.qr(direction + np.float32(1e-8))[0].astype(np.float32)
