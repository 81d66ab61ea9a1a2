"""Lynx's files: the resampler, the IP adapter and the ref adapter, known by content (addons_spec.md 2.1).

The IP adapter is full if it has registers, else lite. Its resampler is the one of the same kind. Both kinds
of layouts are read, Kijai's and ByteDance's. Only headers are read here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.checkpoint import LYNX_PARTS
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.lynx import Kind
from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.checkpoint import SPOKEN, Checkpoint, by_pattern
from trt_wan.runtime.weights.find_files import files_with, short_path
from trt_wan.runtime.weights.needed import kind_of, needed
from trt_wan.runtime.weights.recognition.quantised import KNOWN


@dataclass(frozen=True)
class LynxFiles:
    """The checked files. Without `ip` there is no resampler either."""

    ip: Checkpoint | None = None
    resampler: Checkpoint | None = None
    ref: Checkpoint | None = None
    kind: Kind = "full"

    @property
    def parts(self) -> dict[Part, Checkpoint]:
        found = {"lynx_ip": self.ip, "lynx_resampler": self.resampler, "lynx_ref": self.ref}
        return {part: found[part] for part in LYNX_PARTS if found[part] is not None}  # type: ignore[misc]


def find_lynx(model: ModelConfig, folders: Sequence[Path], named: Sequence[Path] = ()) -> LynxFiles:
    """The files of `named`, files or folders, and for parts that are not there those in or below `folders`.
    Raises WeightsError for a file that does not fit, and for an IP adapter without its resampler.
    """
    groups = _named(named)
    missing = [part for part in LYNX_PARTS if not groups.get(part)]
    groups |= files_with(folders, missing) if missing else {}
    adapters = _fitting(groups, "lynx_ip", model)
    references = _fitting(groups, "lynx_ref", model)
    # Other adapters have resamplers too: one that does not fit counts where one is needed.
    resamplers = _fitting(groups, "lynx_resampler", model) if adapters else []
    pairs = [
        (ip, resampler)
        for ip in sorted(adapters, key=lambda one: kind_of(one, model))  # full before lite
        for resampler in resamplers
        if kind_of(ip, model) == kind_of(resampler, model)
    ]
    ref = references[0] if references else None
    if pairs:
        ip, resampler = pairs[0]
        return LynxFiles(ip, resampler, ref, kind_of(ip, model))
    if adapters and resamplers:
        raise WeightsError(
            f"{short_path(adapters[0].path)} is the {kind_of(adapters[0], model)} IP adapter of Lynx, and "
            f"{short_path(resamplers[0].path)} the {kind_of(resamplers[0], model)} resampler: they must be "
            "of the same kind.",
            "Name both files of one kind with --lynx FILE, or put them among the weights.",
        )
    if adapters and ref is None:
        raise WeightsError(
            f"{short_path(adapters[0].path)} needs a resampler of Lynx, and there is none.",
            f"{SPOKEN['lynx_resampler'][1]} Put it beside the adapter.",
        )
    return LynxFiles(ref=ref)


def _named(named: Sequence[Path]) -> dict[Part, list[Path]]:
    """By part. Raises WeightsError for a file or folder that holds none."""
    groups: dict[Part, list[Path]] = {}
    for path in named:
        if path.is_dir():
            found = files_with([path], LYNX_PARTS)
        else:
            checkpoints = (Checkpoint(path, part) for part in LYNX_PARTS)
            part = next((one.layout.part for one in checkpoints if one.layout), None)
            found = {} if part is None else {part: [path]}
        if not any(found.values()):
            what = Checkpoint(path).what() if path.is_file() else "a folder without them"
            raise WeightsError(
                f"{short_path(path)} is no file of Lynx{what and f': it is {what}'}.",
                "Name the IP adapter, the ref adapter and the resampler with --lynx, or their folder.",
            )
        for part, paths in found.items():
            groups.setdefault(part, []).extend(paths)
    return groups


def _fitting(groups: Mapping[Part, Sequence[Path]], part: Part, model: ModelConfig) -> list[Checkpoint]:
    """Raises the fault of the first file if none fits."""
    fitting: list[Checkpoint] = []
    faults: list[WeightsError] = []
    for path in groups.get(part, ()):
        try:
            if Checkpoint(path, part).layout is not None:
                fitting.append(_checked(path, part, model))
        except WeightsError as error:
            faults.append(error)
    if faults and not fitting:
        raise faults[0]
    return fitting


def _checked(path: Path, part: Part, model: ModelConfig) -> Checkpoint:
    """Raises WeightsError for missing tensors, tensors of another shape and tensors that no adapter has."""
    checkpoint = Checkpoint(path, part)
    wanted = needed(checkpoint, model, part)
    checkpoint.require(wanted, part)
    if foreign := foreign_tensors(checkpoint, wanted):
        raise WeightsError(
            f"{short_path(path)} has tensors that {SPOKEN[part][0]} has not: {by_pattern(foreign)}.",
            SPOKEN[part][1],
        )
    return checkpoint


def foreign_tensors(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [name for name in checkpoint if name not in wanted and name.rpartition(".")[2] not in KNOWN[2:]]
