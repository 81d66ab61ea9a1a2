"""Finds the checkpoint files in folders by the tensors they list; their names do not matter.

Only headers are read. A broken file that no part needs is not mentioned: a folder of models holds thousands
of unrelated files.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from trt_wan.engines.contract import Part
from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.names import SIGNATURES
from trt_wan.runtime.weights.tensor_file import INDEX, read_index, stored_names


def find_files(folders: Sequence[Path], parts: Collection[Part]) -> dict[Part, list[Path]]:
    """For each of `parts` the files (or indexes) in or below `folders` that hold it, at least one.

    Raises WeightsError that names every part that was not found, and the files that could not be read.
    """
    found: dict[Part, list[Path]] = {part: [] for part in parts}
    unknown = [str(folder) for folder in folders if not folder.is_dir()]
    if parts and unknown:
        raise WeightsError(f"There is no weights folder {', '.join(unknown)}.", "Name it with --weights DIR.")
    broken = []
    for path in _checkpoints_below(folders) if parts else ():
        try:
            names = stored_names(path)
        except WeightsError as error:
            broken.append(error.message.rstrip("."))
            continue
        for part in parts:
            if not names.isdisjoint(SIGNATURES[part]):
                found[part].append(path)
    missing = [part for part, paths in found.items() if not paths]
    if missing:
        places = " or ".join(map(str, folders))
        raise WeightsError(
            f"No safetensors file in {places} holds the {' or the '.join(map(spoken, missing))}"
            + "".join(f"; {fault}" for fault in broken)
            + ".",
            f"Put it there, or name it with {', '.join(f'{option(part)} FILE' for part in missing)}.",
        )
    return found


def spoken(part: Part) -> str:
    return part.replace("_", " ")


def option(part: Part) -> str:
    return "--" + part.replace("_", "-")


def _checkpoints_below(folders: Sequence[Path]) -> Iterator[Path]:
    """Indexes, then the files that are no index's shards, each real file once."""
    indexes, singles = [], []
    for path in _walk(folders):
        if path.name.endswith(INDEX):
            indexes.append(path)
        elif path.suffix == ".safetensors":
            singles.append(path)
    seen = set()
    for index in indexes:
        yield index
        try:
            seen |= {shard.resolve() for shard in read_index(index).values()}
        except WeightsError:
            pass  # the caller raises it when it opens the index
    for path in singles:
        real = path.resolve()
        if real not in seen:
            seen.add(real)
            yield path


def _walk(folders: Sequence[Path]) -> Iterator[Path]:
    """All files below, through links to other folders (models live on another disk), each folder once."""
    seen = set()
    for folder in folders:
        for parent, inner, names in os.walk(folder, followlinks=True):
            real = Path(parent).resolve()
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            inner.sort()
            yield from (Path(parent, name) for name in sorted(names))
