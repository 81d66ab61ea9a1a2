"""Finds the checkpoint files in folders by the tensors they list; their names do not matter.

Only headers are read, and only searched for the layouts' signatures. One note tells of files that cannot be
read: not of those in folders for other kinds of models, and of torch's suffixes, which older upscalers have
too, only of files named like a part.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.contract import Part
from trt_wan.errors import LONGEST_MESSAGE, WeightsError, some_of
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.weights.foreign import foreign_file
from trt_wan.runtime.weights.open_file import names_text, open_file
from trt_wan.runtime.weights.recognition.kinds import WAN, other_model
from trt_wan.runtime.weights.recognition.layouts import candidates
from trt_wan.runtime.weights.tensor_file import INDEX, SUFFIXES, read_index, shards_of

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
SMALLEST = 1 << 16  # bytes of a torch file; smaller ones belong to Python packages
READERS = 8  # a network's disk answers many requests at a time
MOST_NAMED = 3  # files in a message
LONGEST_PATH = 90  # characters of one of several paths in a message
OTHER_KINDS = {"loras", "upscale_models", "controlnet", "embeddings"}  # folders in a ComfyUI
LIKE_A_PART = ("wan", "animate", "vae", "t5", "clip")  # in the names of files that may hold a part
SKIPPED = ("__pycache__", ".git")
MOST_FILES = 100_000  # below a folder; far more than people have models
Identity = tuple[int, int]  # device and number of a file


class PartsMissing(WeightsError):
    """Folders, or options, lack parts of the checkpoints. The hint names the options of `trt-wan run`."""


@dataclass(frozen=True)
class _Seen:
    """A file, index or set of shards: its parts, or whether it is another Wan model or broken."""

    path: Path
    parts: set[Part]
    other: bool = False
    broken: str = ""


def find_files(
    folders: Sequence[Path], parts: Collection[Part], progress: Progress = silent
) -> dict[Part, list[Path]]:
    """For each of `parts` the files (indexes, first shards) in or below `folders` that hold it, at least one.

    Reports files that cannot be read. Raises WeightsError that names every part that was not found, and files
    that look like it or are broken.
    """
    if parts:
        require_folders(folders)
    found, seen = _search(folders, parts)
    if missing := [part for part, paths in found.items() if not paths]:
        raise _not_found(folders, missing, seen)
    if broken := sorted(
        (file for file in seen if file.broken and _may_be_ours(file.path)),
        key=lambda file: not _is_like_a_part(file.path),
    ):
        text = f"Files that cannot be used: {some_of([file.broken for file in broken])}."
        progress(Note(text, "unusable_files", {"files": [str(file.path) for file in broken]}))
    return found


def require_folders(folders: Iterable[Path], variable: str = "") -> None:
    """Raises WeightsError for a path that is no folder. `variable` of the environment names them."""
    named = f" of {variable}" if variable else ""
    for folder in folders:
        if os.path.isdir(folder):
            continue
        if os.path.exists(folder):
            kind = foreign_file(folder)
            raise WeightsError(
                f"{folder}{named} is a file{kind and f' ({kind})'}, not a folder of weights.",
                "Name its folder. A single checkpoint is named with --transformer FILE and the like.",
            )
        hint = f"Correct {variable}, or name" if variable else "Name"
        raise WeightsError(f"There is no weights folder {folder}{named}.", f"{hint} it with --weights DIR.")


def checkpoint_in(folder: Path) -> Path:
    """The index, first shard or file of the only checkpoint in a folder, or in one of its folders. Raises
    WeightsError.
    """
    groups = list(_groups([folder]))
    if len(groups) > 1:
        groups = [group for group in groups if _look(group).parts]
    if len(groups) == 1:
        return groups[0][0]
    names = [str(group[0].relative_to(folder)) for group in groups]
    fault = f"several checkpoints: {some_of(names)}" if groups else "no checkpoint"
    raise WeightsError(f"The folder {folder} holds {fault}.", "Name one of its files.")


def files_with(folders: Sequence[Path], parts: Collection[Part]) -> dict[Part, list[Path]]:
    """For each of `parts` the files in or below `folders` that may hold it; none is an empty list."""
    return _search(folders, parts)[0]


def missing_parts(folders: Sequence[Path], parts: Collection[Part]) -> list[Part]:
    """Those of `parts` that no file in or below `folders` holds."""
    return [part for part, paths in _search(folders, parts)[0].items() if not paths]


def _search(folders: Sequence[Path], parts: Collection[Part]) -> tuple[dict[Part, list[Path]], list[_Seen]]:
    unreadable: list[OSError] = []
    with ThreadPoolExecutor(READERS) as readers:
        seen = list(readers.map(_look, _groups(folders, unreadable.append) if parts else ()))
    for error in unreadable:
        path = Path(error.filename)
        seen.append(_Seen(path, set(), broken=f"the folder {short_path(path)}: {error.strerror}"))
    return {part: [file.path for file in seen if part in file.parts] for part in parts}, seen


def _not_found(folders: Sequence[Path], missing: Sequence[Part], seen: Sequence[_Seen]) -> PartsMissing:
    options = ", ".join(f"{option(part)} FILE" for part in missing)
    names = " or the ".join(map(spoken, missing))
    if not folders:
        return PartsMissing(
            f"No file is named for the {names}.", f"Name it with {options}, or a folder with --weights DIR."
        )
    others = [f"{file.path.name} is {what}" for file in seen if file.other and (what := _other(file.path))]
    broken = [file.broken for file in seen if file.broken]
    told = (others if "transformer" in missing else []) + broken
    text = f"No file in {' or '.join(map(short_path, folders[:MOST_NAMED]))} holds the {names}"
    room = max(80, LONGEST_MESSAGE - 20 - len(text))
    return PartsMissing(
        f"{text}; {some_of(told, room)}." if told else f"{text}.", f"Put it there, or name it with {options}."
    )


def _may_be_ours(path: Path) -> bool:
    if not OTHER_KINDS.isdisjoint(path.parts):
        return False
    return not path.name.lower().endswith(TORCH_SUFFIXES) or _is_like_a_part(path)


def _is_like_a_part(path: Path) -> bool:
    return any(part in path.name.lower() for part in LIKE_A_PART)


def short_path(path: Path | str) -> str:
    """The end of a path, for a message with several."""
    text = str(path)
    return text if len(text) <= LONGEST_PATH else f"…{text[1 - LONGEST_PATH :]}"


def spoken(part: Part) -> str:
    return part.replace("_", " ")


def option(part: Part) -> str:
    return "--" + part.replace("_", "-")


def _look(group: Sequence[Path]) -> _Seen:
    """The parts that the files of a group list; the first file stands for the group."""
    path = group[0]
    try:
        if path.name.endswith(INDEX):
            read_index(path)
        text = b"\n".join(map(names_text, group))
    except WeightsError as error:
        return _Seen(path, set(), broken=error.message.rstrip(".").replace(str(path), short_path(path.name)))
    parts = candidates(text)
    return _Seen(path, parts, not parts and any(f'{name}"'.encode() in text for name in WAN))


def _other(path: Path) -> str:
    try:
        return other_model({name: entry.shape for name, entry in open_file(path).entries.items()})
    except WeightsError:
        return ""


def _groups(
    folders: Sequence[Path], unreadable: Callable[[OSError], None] | None = None
) -> Iterator[Sequence[Path]]:
    """Indexes, then sets of shards without one, then single files, each real file once."""
    indexes: list[Path] = []
    sets: list[Path] = []
    singles: list[Path] = []
    for path in files_below(folders, unreadable):
        name = path.name.lower()
        if path.name.endswith(INDEX):
            indexes.append(path)
        elif name.endswith(SUFFIXES):
            (sets if shards_of(path) else singles).append(path)
        elif name.endswith(".gguf") or (name.endswith(TORCH_SUFFIXES) and _size(path) >= SMALLEST):
            singles.append(path)
    seen: set[Identity | Path] = set()
    for index in indexes:
        if _new(index, seen):
            yield (index,)
        try:
            seen |= {_identity(shard) for shard in read_index(index).values()}
        except WeightsError:
            pass  # the caller raises it when it opens the index
    for path in sets:
        group = [shard for shard in shards_of(path) if shard.is_file()]
        if _new(path, seen):
            seen |= set(map(_identity, group))
            yield group
    for path in singles:
        if _new(path, seen):
            yield (path,)


def _new(path: Path, seen: "set[Identity | Path]") -> bool:
    """Whether a file is not in `seen`, to which it is added: links and hard links are one file."""
    identity = _identity(path)
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _identity(path: Path) -> Identity | Path:
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def files_below(
    folders: Sequence[Path], unreadable: Callable[[OSError], None] | None = None
) -> Iterator[Path]:
    """All files below, through links to other folders (models live on another disk), each folder once.
    `unreadable` is told of folders that cannot be read.
    """
    seen: set[Identity | Path] = set()
    count = 0
    for folder in folders:
        for parent, inner, names in os.walk(folder, onerror=unreadable, followlinks=True):
            if not _new(Path(parent), seen):
                inner.clear()
                continue
            count += len(names)
            if count > MOST_FILES:
                raise WeightsError(
                    f"{folder} has more than {MOST_FILES} files below it.",
                    "Name the folder of the models alone.",
                )
            inner[:] = sorted(name for name in inner if name not in SKIPPED)
            yield from (Path(parent, name) for name in sorted(names))
