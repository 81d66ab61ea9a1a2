"""The folder of prepared clips: names of its files, their quality, and how they appear.

Files are made in a hidden folder inside the output folder and moved when all are complete, src_ref.png last.
A folder without src_ref.png does not count as prepared clips.
"""

import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from trt_wan.errors import InputError, OutputError
from trt_wan.preprocess.clips.sizes import Size
from trt_wan.preprocess.people.person import JOINTS, NOBODY, Box, PersonFrame
from trt_wan.runtime.video.writer import VideoWriter

REFERENCE = "src_ref.png"
POSE = "src_pose.mp4"
FACE = "src_face.mp4"
BACKGROUND = "src_bg.mp4"
MASK = "src_mask.mp4"
PREVIEW = "preview.mp4"
KEYPOINTS = "keypoints.json"
ALL = (POSE, FACE, BACKGROUND, MASK, PREVIEW, KEYPOINTS, REFERENCE)

# x264. Masks of 16-pixel blocks survive it exactly. At 18 the hole's edge in the background rings.
CRF = 10
PREVIEW_CRF = 20
PRESET = "veryfast"  # these files are read once or twice: half the time of "medium", a little larger
SCHEMA = "trt-wan/keypoints/1"


class ClipWriter(VideoWriter):
    """A VideoWriter with a chosen quality."""

    def __init__(
        self, path: Path, size: Size, rate: Fraction, crf: int = CRF, sound: Path | None = None
    ) -> None:
        self._crf = crf
        super().__init__(path, *size, rate, sound)

    def _start(self, sound: Path | None) -> None:
        super()._start(sound)
        self._video.options = {**self._video.options, "crf": str(self._crf), "preset": PRESET}


class ArtifactFolder:
    """A context manager. Files are made in `making`, and `publish()` moves them to `path`.

    Without `publish()` all new files are removed, and files that were in `path` before stay unchanged.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        there = [name for name in ALL if (path / name).exists()]
        if there and not overwrite:
            raise OutputError(
                f"{path} has {', '.join(there)} already.",
                f"Choose another folder, allow them to be overwritten, or use them: --inputs {path}.",
            )
        self.path = path
        self._made = _missing_parents(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.making = Path(tempfile.mkdtemp(prefix=".making-", dir=path))
        except OSError as error:
            self._remove_made()
            raise OutputError(
                f"The folder {path} cannot be written to ({error.strerror}).", "Choose a folder of your own."
            ) from error

    def publish(self) -> Path:
        """Moves every file to its place. Removes files of an earlier run that this run has not made."""
        for name in reversed(ALL):
            (self.path / name).unlink(missing_ok=True)
        for name in ALL:
            if (self.making / name).exists():
                os.replace(self.making / name, self.path / name)
        self._made = []
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.making, ignore_errors=True)
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError):  # another program has put a file in it
                folder.rmdir()


@dataclass(frozen=True)
class FoundPeople:
    """Who was found where: the followed person in every frame, and the character in the reference."""

    frames: list[PersonFrame]
    size: Size  # of the clip, width and height
    reference: PersonFrame | None  # in the reference at the size of `reference_size`
    reference_size: Size


def rounded(found: FoundPeople) -> FoundPeople:
    """As the file will have it, so that clips made from the file are the same."""

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
    """JSON, a line per frame, to be edited by hand: null is nobody, a score of 0 a joint not known."""
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
    """InputError for a file that is not one of ours, or was edited into something that is not possible."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_hook=_packed)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}).", "Give a keypoints.json.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}.", "Mend that line, or make it again."
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
    """InputError where keypoints from a file do not belong to the frames of this job."""
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
    """Keypoints as an array as soon as they are parsed: as lists those of a long clip take gigabytes."""
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
    return InputError(f"{path} cannot be used: {why}.", "Mend it, or make it again with trt-wan preprocess.")


def _missing_parents(path: Path) -> list[Path]:
    """The folders that have to be made, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]
