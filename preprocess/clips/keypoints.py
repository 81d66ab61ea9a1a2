"""keypoints.json: the people found in every frame, written for editing by hand and read back."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.errors import InputError
from trt_wan.preprocess.clips.sizes import Size
from trt_wan.preprocess.people.person import JOINTS, NOBODY, Box, PersonFrame

SCHEMA = "trt-wan/keypoints/1"

# Bytes of a file that is indented, with every number on a line of its own, are 20,000 a frame.
MOST_BYTES, MOST_BYTES_PER_FRAME = 1 << 20, 32_000
MOST_DEPTH = 32  # brackets inside each other; the file has 5
MOST_DIGITS = 64
MOST_SIDE = 1 << 15  # pixels
# Strings are skipped. A string without an end matches too, else the search for its end is repeated.
BRACKETS = re.compile(rb'(?s)"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{]|[\]}]')
LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MOST_DIGITS + 1))


@dataclass(frozen=True)
class FoundPeople:
    """The followed person in every frame, and the character in the reference."""

    frames: list[PersonFrame]
    size: Size  # width and height of the clip
    reference: PersonFrame | None  # in the reference scaled to `reference_size`
    reference_size: Size


def rounded(found: FoundPeople) -> FoundPeople:
    """The people with numbers as rounded in the file, so that clips made from the file are the same."""

    def person(value: PersonFrame) -> PersonFrame:
        written = _as_json(value)
        box, keypoints = written["box"], written["keypoints"]
        return PersonFrame(
            None if box is None else Box(*box),
            None if keypoints is None else np.asarray(keypoints, np.float32),
        )

    reference = None if found.reference is None else person(found.reference)
    return replace(found, frames=[person(frame) for frame in found.frames], reference=reference)


def write_keypoints(path: Path, found: FoundPeople) -> None:
    """JSON with a line per frame. null is a frame without the person, score 0 an unknown joint."""
    head = {
        "schema": SCHEMA,
        "size": list(found.size),
        "reference_size": list(found.reference_size),
        "reference": None if found.reference is None else _as_json(found.reference),
    }
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{json.dumps(head)[:-1]}, "frames": [')
        for k, person in enumerate(found.frames):
            file.write(f"{',' if k else ''}\n{json.dumps(_as_json(person))}")
        file.write("\n]}\n")


def read_keypoints(path: Path, frames: int = 10_000) -> FoundPeople:
    """The people of a clip of about `frames` frames: a much larger file is not read. Raises InputError for
    other files and for impossible edits.

    A file of another length is read too: `require_fit` names both lengths.
    """
    data = _parsed(path, MOST_BYTES + MOST_BYTES_PER_FRAME * frames)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise _impossible(path, f"it does not say that it is {SCHEMA}")
    people, reference = data.get("frames"), data.get("reference")
    if not isinstance(people, list) or not people:
        raise _impossible(path, "it has no frames")
    return FoundPeople(
        [_person(path, f"frame {k}", value) for k, value in enumerate(people)],
        _size(path, data.get("size")),
        None if reference is None else _person(path, "the reference", reference),
        _size(path, data.get("reference_size")),
    )


def _parsed(path: Path, most: int) -> object:
    """The values in the file. Its size, depth and numbers are limited before Python makes objects of it."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}).", "Give a keypoints.json.") from error
    if len(content) > most:
        raise _impossible(path, f"it has more than {most} bytes, too many for this clip's people")
    if (deep := _too_deep(content)) is not None:
        raise _impossible(
            path, f"line {_line(content, deep)} has more than {MOST_DEPTH} brackets inside each other"
        )
    if long := LONG_NUMBER.search(content):
        place = _line(content, long.start())
        raise _impossible(path, f"line {place} has a number of more than {MOST_DIGITS} digits")
    try:
        return json.loads(content.decode("utf-8-sig"), object_hook=_packed)
    except UnicodeDecodeError as error:
        raise _impossible(path, f"line {_line(content, error.start)} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}.", "Correct that line, or make it again."
        ) from error


def _too_deep(content: bytes) -> int | None:
    """The place of the first bracket that is too deep."""
    depth = 0
    for found in BRACKETS.finditer(content):
        bracket = found[0][:1]
        depth += (bracket in b"[{") - (bracket in b"]}")
        if depth > MOST_DEPTH:
            return found.start()
    return None


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def require_fit(path: Path, found: FoundPeople, frames: int, size: Size) -> None:
    """Raises InputError if keypoints from a file do not belong to the frames of this job."""
    if len(found.frames) != frames:
        raise InputError(
            f"{path} has {len(found.frames)} frames where this clip and rate give {frames}.",
            "Give the clip and the --rate that it was made with.",
        )
    if found.size != size:
        here, there = ("x".join(map(str, sides)) for sides in (size, found.size))
        raise InputError(
            f"{path} is for a clip of {there}, and this one is {here}.",
            "Give the clip that it was made with, or make it again.",
        )


def _as_json(person: PersonFrame) -> dict[str, Any]:
    box, keypoints = person.box, person.keypoints
    sides = None if box is None else [box.x0, box.y0, box.x1, box.y1, box.score]
    return {
        "box": None if sides is None else [round(float(value), 3) for value in sides],
        "keypoints": None
        if keypoints is None
        else [[round(float(value), 3) for value in joint] for joint in keypoints],
    }


def _packed(value: dict[str, Any]) -> dict[str, Any]:
    """Makes keypoints an array while parsing: as lists those of a long clip take gigabytes."""
    rows = value.get("keypoints")
    if isinstance(rows, list) and len(rows) == JOINTS and all(_are_numbers(row, 3) for row in rows):
        value["keypoints"] = np.asarray(rows, np.float32)
    return value


def _person(path: Path, where: str, value: object) -> PersonFrame:
    if value is None:
        return NOBODY
    if not isinstance(value, dict) or value.keys() != {"box", "keypoints"}:
        raise _impossible(path, f"{where} is neither null nor a box with keypoints")
    box, keypoints = value["box"], value["keypoints"]
    if box is not None:
        if not _are_numbers(box, 5):
            raise _impossible(path, f"the box of {where} is not 5 numbers")
        box = Box(*box)
        if box.width < 0 or box.height < 0:
            raise _impossible(path, f"the box of {where} ends before it begins (x0, y0, x1, y1, score)")
    if keypoints is None or isinstance(keypoints, np.ndarray):
        return PersonFrame(box, keypoints)
    if not isinstance(keypoints, list) or len(keypoints) != JOINTS:
        raise _impossible(path, f"{where} does not have {JOINTS} keypoints")
    wrong = next(k for k, row in enumerate(keypoints) if not _are_numbers(row, 3))
    raise _impossible(path, f"keypoint {wrong} of {where} is not 3 numbers")


def _are_numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(number) in (int, float) and abs(number) < 1e9 for number in value)  # no NaN, no infinity
    )


def _size(path: Path, value: object) -> Size:
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and 0 < side < MOST_SIDE for side in value)
    ):
        return value[0], value[1]
    raise _impossible(path, "it does not say what size its frames have")


def _impossible(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be used: {why}.", "Correct it, or prepare the clip again without --keypoints."
    )
