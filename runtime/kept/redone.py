"""The part of a record about windows that were rendered again (redo.py): in order, for each time, the windows
by number with their seeds, and the file that they were rendered into.

    "redone": [{"seeds": {"2": 5}, "of": {"name": "out.mp4", "bytes": 1234, "sha256": "…"}}]
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trt_wan.errors import InputError
from trt_wan.runtime.kept.identity import Identity, identity
from trt_wan.runtime.kept.record import Record

KEY = "redone"  # in a record's `video`


@dataclass(frozen=True)
class Redone:
    seeds: Mapping[int, int]  # by window, from 1
    of: Identity


def redone_of(record: Record) -> list[Redone]:
    """Raises InputError for a record that another program has changed."""
    try:
        return [
            Redone({int(number): int(seed) for number, seed in each["seeds"].items()}, dict(each["of"]))
            for each in record.video.get(KEY, ())
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            "The record of the windows that were rendered again cannot be read.",
            "Name the video as it was written.",
        ) from error


def seeds_of(record: Record, numbers: Mapping[int, int | None]) -> dict[int, int]:
    """New seeds for the windows `numbers`: the given one, else the next after that window's own."""
    base: Any = record.job.get("seed", 0)
    now = {number: seed for each in redone_of(record) for number, seed in each.seeds.items()}
    return {
        number: (now.get(number, base) + 1) % 2**64 if seed is None else seed
        for number, seed in numbers.items()
    }


def plain(record: Record) -> Record:
    """The record of the video before any of its windows was rendered again."""
    return replace(record, video={name: value for name, value in record.video.items() if name != KEY})


def with_redone(record: Record, before: Record, seeds: Mapping[int, int], video: Path) -> Record:
    """`record` is that of the job; `before` that of `video`. Raises OSError."""
    named = {str(number): seed for number, seed in seeds.items()}
    made = [*before.video.get(KEY, ()), {"seeds": named, "of": dict(identity(video))}]
    return replace(record, video={**record.video, KEY: made})
