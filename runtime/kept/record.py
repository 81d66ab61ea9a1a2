"""The record of a run: all that is needed to make its video again. It travels in the video's metadata.

    {"trt_wan_record": 1, "versions": {…}, "job": {…}, "model": {…}, "files": {…}, "video": {…}, …}

`job`, `model`, `files` and `video` decide the bits, `versions` may. `options` are those of `trt-wan run`. The
record in a video names files without their folders, for videos are shared; the file
`<stem>.json` beside it has whole paths. Equal runs have equal records: there is no date in one.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from trt_wan.engines.store.files import replace_atomically
from trt_wan.errors import InputError, shown
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.kept.identity import Identity, is_same

FORMAT, KEY = 1, "trt_wan_record"
DECIDING, FILES = ("job", "model", "video"), "files"


@dataclass(frozen=True)
class Record:
    """Values are those of JSON. `paths` has the files of `files` and `options` with their folders."""

    versions: Mapping[str, str]
    job: Mapping[str, Any]
    model: Mapping[str, Any]
    files: Mapping[str, Sequence[Identity]]  # by role
    video: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, Any] = field(default_factory=dict)

    def text(self, with_paths: bool) -> str:
        """JSON: one line for metadata, many lines with the paths."""
        values = {name: getattr(self, name) for name in _FIELDS if with_paths or name != "paths"}
        return json.dumps(
            {KEY: FORMAT, **values}, ensure_ascii=False, sort_keys=True, indent=1 if with_paths else None
        )

    def differences(self, now: "Record") -> list["Difference"]:
        """All that decides bits and is another in `now`."""
        found = []
        for group in DECIDING:
            before, after = (dict(_flat(getattr(record, group))) for record in (self, now))
            for name in dict.fromkeys((*before, *after)):
                if before.get(name) != after.get(name):
                    found.append(Difference(name, before.get(name), after.get(name), group))
        for role in dict.fromkeys((*self.files, *now.files)):
            ours, theirs = self.files.get(role, ()), now.files.get(role, ())
            if len(ours) != len(theirs) or not all(map(is_same, ours, theirs)):
                found.append(Difference(role, _names(ours), _names(theirs), FILES))
        return found

    def other_versions(self, now: "Record") -> list[str]:
        """Sentences' parts such as "numpy 2.1 (now 2.2)"."""
        names = dict.fromkeys((*self.versions, *now.versions))
        pairs = [(name, self.versions.get(name, "none"), now.versions.get(name, "none")) for name in names]
        return [
            f"{shown(name)} {shown(before)} (now {shown(after)})"
            for name, before, after in pairs
            if before != after
        ]


@dataclass(frozen=True)
class Difference:
    name: str  # a setting's, or the role of a file
    before: Any
    now: Any
    group: str  # the part of the record

    @property
    def text(self) -> str:
        name = shown(self.name.replace("_", " "))
        if self.group != FILES:
            return f"{name} {_value(self.before)} (now {_value(self.now)})"
        other = "has other content" if self.before == self.now else f"(now {_value(self.now)})"
        return f"the {name} {_value(self.before)} {other}"


_FIELDS = tuple(field.name for field in dataclasses.fields(Record))


def read_record(path: Path) -> Record:
    """The record in a video or a .json. A .json beside a video with the same record adds its paths. Raises
    InputError.
    """
    if path.suffix.lower() == ".json":
        return _parsed(path, _text_of(path))
    try:
        with av.open(str(path.absolute()), metadata_errors="ignore") as container:
            metadata = {name.lower(): value for name, value in container.metadata.items()}
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a video ({error.strerror}).", "Name a video that trt-wan has made."
        ) from error
    record = _parsed(path, metadata.get("comment", ""))
    with suppress(InputError):  # a file of the user's, or none
        beside = sidecar_of(path)
        found = _parsed(beside, _text_of(beside))
        if dataclasses.replace(found, paths={}) == record:
            return found
    return record


def sidecar_of(video: Path) -> Path:
    return video.with_suffix(".json")


def write_sidecar(video: Path, record: Record, progress: Progress) -> None:
    """Raises OSError. A file of the user's with that name stays, and a note says so."""
    path = sidecar_of(video)
    if path.exists():
        try:
            _parsed(path, _text_of(path))
        except InputError:
            text = f"{path} is no record of a run and stays: the video's own is in its metadata."
            progress(Note(text, "sidecar_kept", {"file": str(path)}))
            return
    replace_atomically(path, record.text(with_paths=True) + "\n")


def as_values(made: Any) -> Any:
    """A dataclass as values of JSON, without its files: they have a part of their own in a record."""
    if dataclasses.is_dataclass(made):
        return {
            field.name: as_values(value)
            for field in dataclasses.fields(made)
            if not isinstance(value := getattr(made, field.name), Path)
        }
    if isinstance(made, Mapping):
        return {str(name): as_values(value) for name, value in made.items()}
    if isinstance(made, tuple | list):
        return [as_values(value) for value in made if not isinstance(value, Path)]
    return made if made is None or isinstance(made, bool | int | float | str) else str(made)


def from_values(values: Any) -> Record | None:
    """None for values that are no record of this version."""
    if not isinstance(values, dict) or values.get(KEY) != FORMAT:
        return None
    made = {name: values.get(name, {}) for name in _FIELDS}
    if not all(isinstance(value, dict) for value in made.values()):
        return None
    if not all(isinstance(made["paths"].get(name, {}), dict) for name in ("files", "options")):
        return None
    files = made["files"].values()
    if not all(isinstance(role, list) and all(isinstance(file, dict) for file in role) for role in files):
        return None
    return Record(**made)


def _parsed(path: Path, text: str) -> Record:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and isinstance(values.get(KEY), int) and values[KEY] > FORMAT:
        raise InputError(f"{path} was made by a newer trt-wan.", "Update trt-wan.")
    record = from_values(values)
    if record is None:
        raise InputError(
            f"{path} has no record of a run in it.",
            "Name a video that trt-wan has made and no other program has changed, or the .json beside it.",
        )
    return record


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{name} {key}".strip())
    elif isinstance(values, list | tuple) and any(isinstance(value, Mapping) for value in values):
        for number, value in enumerate(values, 1):
            yield from _flat(value, f"{name} {number}")
    else:
        yield name, list(values) if isinstance(values, tuple) else values


def _names(files: Sequence[Identity]) -> str:
    return ", ".join(str(file.get("name")) for file in files)


def _value(value: Any) -> str:
    return "none" if value in (None, "", []) else shown(value)
