"""keypoints.json: the people found in every frame, written for editing by hand and read back."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trt_wan.errors import InputError
from trt_wan.preprocess.clips.sizes import Size
from trt_wan.preprocess.people.person import JOINTS, NOBODY, Box, PersonFrame

SCHEMA = "trt-wan/keypoints/1"


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


def read_keypoints(path: Path) -> FoundPeople:
    """Raises InputError for other files and for impossible edits."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_hook=_packed)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}).", "Give a keypoints.json.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}.", "Correct that line, or make it again."
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise _impossible(path, f"it does not say that it is {SCHEMA}")
    frames, reference = data.get("frames"), data.get("reference")
    if not isinstance(frames, list) or not frames:
        raise _impossible(path, "it has no frames")
    return FoundPeople(
        [_person(path, f"frame {k}", value) for k, value in enumerate(frames)],
        _size(path, data.get("size")),
        None if reference is None else _person(path, "the reference", reference),
        _size(path, data.get("reference_size")),
    )


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
    if not isinstance(value, dict):
        raise _impossible(path, f"{where} is neither null nor a box with keypoints")
    box, keypoints = value.get("box"), value.get("keypoints")
    if box is not None:
        if not _are_numbers(box, 5):
            raise _impossible(path, f"the box of {where} is not 5 numbers")
        box = Box(*box)
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
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    raise _impossible(path, "it does not say what size its frames have")


def _impossible(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be used: {why}.", "Correct it, or prepare the clip again without --keypoints."
    )
