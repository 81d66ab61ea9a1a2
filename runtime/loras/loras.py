"""The LoRAs of an open model: files that stay open, and which tensors they change from one job to the next.

A strength is the same in every step. The engines take one weight per linear, so another strength is another
merge: 19 GB read and 2 TFLOP for a rank of 64. Steps of two strengths without a merge between them would need
two sets of merged packs in page-locked memory, of which each step streams one; or engines whose linears take
the factors as inputs. Neither is here.
"""

import filecmp
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import ModelConfig
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.job import Lora
from trt_wan.runtime.loras.changes import Rows, matrix
from trt_wan.runtime.loras.lora_file import LoraFile, open_lora
from trt_wan.runtime.loras.merged import Merge, MergedTensors
from trt_wan.runtime.loras.peft_config import config_file
from trt_wan.runtime.weights.stored import Tensors

MOST_OPEN = 32  # files

FileId = tuple[Path, int, int]  # the file, its time of change in ns, its bytes; with PEFT's settings
Merged = Mapping[str, tuple[tuple[FileId, float], ...]]  # by tensor: files and strengths, sorted


@dataclass(frozen=True)
class Merging:
    """The weights of a job. `changed` are the tensors that differ from those of the job before."""

    tensors: MergedTensors
    changed: frozenset[str]
    merged: Merged = field(repr=False)


class Loras:
    def __init__(self, config: ModelConfig, base: Tensors) -> None:
        self._config, self._base = config, base
        self._open: dict[FileId, LoraFile] = {}  # the file used last comes last
        self._merged: Merged = {}

    def merging(self, loras: Collection[Lora], progress: Progress) -> Merging:
        """Opens files that are new or changed on the disk, and reads them whole once, to find numbers that
        are not finite. Raises WeightsError. Call `done` when the weights have been taken over.
        """
        opened: dict[FileId, LoraFile] = {}
        deltas: dict[str, list[tuple[FileId, float]]] = {}
        changes = {}
        for lora in loras:
            key = _file_id(lora.file)
            if key not in opened:
                opened[key] = self._opened(key, lora.file)
                changes[key] = opened[key].changes()
                progress(_note(opened[key], len(changes[key])))
            for name in changes[key] if lora.strength else ():
                deltas.setdefault(name, []).append((key, lora.strength))
        for text, data in _repeated(loras):
            progress(Note(text, "lora_repeated", data))
        self._open = dict([*self._open.items(), *opened.items()][-MOST_OPEN:])
        merged = {name: tuple(sorted(parts)) for name, parts in deltas.items()}
        tensors = {
            name: Merge(tuple((strength, change) for key, strength in parts for change in changes[key][name]))
            for name, parts in merged.items()
        }
        changed = {n for n in {*merged, *self._merged} if merged.get(n) != self._merged.get(n)}
        if DIRECTION in changed:
            changed.add(ORTHONORMAL)
        return Merging(MergedTensors(self._base, tensors), frozenset(changed), merged)

    def done(self, merging: Merging) -> None:
        self._merged = merging.merged

    def _opened(self, key: FileId, path: Path) -> LoraFile:
        if key not in self._open:
            made = open_lora(path, self._config, self._whole)
            made.require_finite()
            return made
        return self._open[key]

    def _whole(self, name: str) -> Rows:
        return matrix(self._base[name])


def _file_id(path: Path) -> FileId:
    settings = config_file(path)  # changes with the file
    try:
        found = [file.stat() for file in (path, settings) if file is not None]
    except OSError:
        return path.absolute(), 0, 0  # opening it tells the fault
    return path.resolve(), max(one.st_mtime_ns for one in found), sum(one.st_size for one in found)


def _repeated(loras: Collection[Lora]) -> Iterator[tuple[str, dict[str, object]]]:
    """A sentence about each LoRA that is there more than once, also as a link or a copy."""
    alike: list[list[Lora]] = []
    for lora in loras:
        group = next((group for group in alike if _is_same(group[0].file, lora.file)), None)
        alike.append([lora]) if group is None else group.append(lora)
    for group in alike:
        if len(group) > 1:
            strengths = [lora.strength for lora in group]
            sums = " + ".join(f"{strength:g}" for strength in strengths)
            text = f"LoRA {group[0].file.name} is given {len(group)} times; its strengths are added:"
            data: dict[str, object] = {"file": str(group[0].file), "strengths": strengths}
            yield f"{text} {sums} = {sum(strengths):g}.", data


def _is_same(one: Path, other: Path) -> bool:
    return one.samefile(other) or (
        one.stat().st_size == other.stat().st_size and filecmp.cmp(one, other, shallow=False)
    )


def _note(lora: LoraFile, tensors: int) -> Note:
    text = f"LoRA {lora.path.name}: changes {tensors} tensors."
    data = {"file": str(lora.path), "tensors": tensors, "unmatched": dict(lora.unmatched)}
    return Note(f"{text} {lora.left_aside}".rstrip(), "lora", data)
