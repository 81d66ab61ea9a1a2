"""Clips that are no video files: folders of numbered pictures, `%04d` patterns, animated WebP, one picture.

`open_clip` opens any clip. Like a `Clip`, it gives uint8 RGB frames [H, W, 3] by number.
"""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import InputError, with_commands
from trt_wan.runtime.events import Note
from trt_wan.runtime.video.arriving import ArrivingClip
from trt_wan.runtime.video.container import MAX_PIXELS, refuse_missing, refuse_size, uneven
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.video.pictures import WHITE, read_transparent
from trt_wan.runtime.video.reader import Clip, Frames, Picture
from trt_wan.runtime.video.transparency import over, transparency_note

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
RATE = Fraction(30)  # frames per second of pictures that have none: that of the official preprocessing
PATTERN = re.compile(r"(?P<before>[^%]*)%(?:0(?P<digits>[1-9]))?d(?P<after>[^%]*)")
NUMBERED = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?P<after>\D*)")  # the last number in the name


class Stills(Frames):
    """An open clip of `frames` pictures, all of one size. `read(k)` is picture k."""

    has_sound = False
    times: NDArray[np.float64] | None = None  # see Clip

    def __init__(
        self, path: Path, frames: int, rate: Fraction, read: Callable[[int], Picture], notes: list[Note]
    ) -> None:
        self.path, self.frames, self.rate, self.notes = path, frames, rate, notes
        self.used, self.start = range(frames), Fraction(0)
        self._read = read
        self._last = (0, read(0))
        self.height, self.width = self._last[1].shape[:2]

    def cut(self, cut: Cut) -> Self:
        """Call before the first frame is read: the clip then consists of those frames alone."""
        self.used = cut.of(self.path, np.arange(self.frames) / float(self.rate))
        self.frames, self.start = len(self.used), self.used.start / self.rate
        if self.times is not None:
            self.times = self.times[self.used.start : self.used.stop] - self.times[self.used.start]
        return self

    def _picture(self, index: int) -> Picture:
        index = self.used[index]
        if index != self._last[0]:
            picture = self._read(index)
            if picture.shape[:2] != (self.height, self.width):
                raise InputError(
                    f"{self.path} changes its size at frame {index}: {self.width}x{self.height} to "
                    f"{picture.shape[1]}x{picture.shape[0]}.",
                    "Give pictures of one size.",
                )
            self._last = (index, picture)
        return self._last[1]


AnyClip = Clip | Stills | ArrivingClip


def open_clip(
    path: Path, history: int = 1, rate: Fraction = RATE, one: bool = False, cut: Cut | None = None
) -> AnyClip:
    """A video file, an animation, a folder of numbered pictures, a pattern such as `dance/%04d.png`, and
    where `one` is true a single picture. `rate` is that of pictures, which have none. With `cut` only those
    frames, but a clip of one frame stays as it is where `one` is true. Raises InputError.
    """
    if cut is not None:
        cut = replace(cut, unless_one=one)
    stills = _open_stills(path, rate, one)
    if stills is not None:
        return stills if cut is None else stills.cut(cut)
    return Clip(path, history, cut)


def _open_stills(path: Path, rate: Fraction, one: bool) -> Stills | None:
    """None for a video file."""
    if os.path.isdir(path):  # unlike Path.is_dir, no OSError for a name that is too long
        return _numbered(path, _series_in(path), rate)
    if not os.path.exists(path) and (pattern := PATTERN.fullmatch(path.name)):
        return _numbered(path, _series_of(path, pattern), rate)
    if _is_animated_webp(path):
        return _animation(path)
    if one and path.suffix.lower() in SUFFIXES and not _is_animated_png(path):
        return _pictures(path, [path], rate, [])
    return None


def _series_in(folder: Path) -> dict[int, Path]:
    """The numbered pictures of a folder with one series of them."""
    series: dict[tuple[str, ...], dict[int, Path]] = {}
    for file in folder.iterdir():
        match = NUMBERED.fullmatch(file.stem)
        if match and file.suffix.lower() in SUFFIXES:
            kind = (match["before"], match["after"], file.suffix)
            series.setdefault(kind, {})[int(match["number"])] = file
    if not series:
        raise InputError(
            f"{folder} has no numbered pictures in it.",
            "Give a video file, or a folder with pictures such as 0001.png, 0002.png.",
        )
    if len(series) > 1:
        kinds = [f"{kind[0]}%d{kind[1]}{kind[2]}" for kind in sorted(series)]
        told = ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")
        raise InputError(
            f"{folder} has {len(kinds)} series of numbered pictures: {told}.",
            f"Name one of them: {folder / kinds[0]}",
        )
    return next(iter(series.values()))


def _series_of(path: Path, pattern: re.Match[str]) -> dict[int, Path]:
    digits = pattern["digits"]
    number = rf"(\d{{{digits},}})" if digits else r"(\d+)"
    name = re.compile(re.escape(pattern["before"]) + number + re.escape(pattern["after"]))
    files = path.parent.iterdir() if path.parent.is_dir() else iter(())
    series = {int(match[1]): file for file in files if (match := name.fullmatch(file.name))}
    if not series:
        raise InputError(f"No file fits {path}.", "Check the folder, and how many digits the numbers have.")
    return series


def _numbered(path: Path, series: dict[int, Path], rate: Fraction) -> Stills:
    numbers = sorted(series)
    missing = numbers[-1] - numbers[0] + 1 - len(numbers)
    gaps = f", of which {missing} are missing" if missing else ""
    note = Note(
        f"{path} is {len(numbers)} pictures, numbered {numbers[0]} to {numbers[-1]}{gaps}. "
        f"They have no rate; they are shown at {float(rate):g} frames per second (--rate).",
        "pictures",
        {"file": str(path), "frames": len(numbers), "missing": missing, "rate": float(rate)},
    )
    return _pictures(path, [series[number] for number in numbers], rate, [note])


def _pictures(path: Path, files: Sequence[Path], rate: Fraction, notes: list[Note]) -> Stills:
    opacity = read_transparent(files[0]).opacity
    if opacity is not None:
        notes = [*notes, transparency_note(files[0], opacity, "white")]
    return Stills(path, len(files), rate, lambda k: read_transparent(files[k]).over(WHITE), notes)


def _head(path: Path) -> bytes:
    refuse_missing(path)
    with path.open("rb") as file:
        return file.read(64)


def _is_animated_png(path: Path) -> bool:
    return b"acTL" in _head(path)


def _is_animated_webp(path: Path) -> bool:
    head = _head(path)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def _animation(path: Path) -> Stills:
    """An animated WebP, which ffmpeg cannot decode. All of its frames are in memory."""
    data = np.fromfile(path, np.uint8)
    head = data[:30].tobytes()
    width, height = (int.from_bytes(head[k : k + 3], "little") + 1 for k in (24, 27))
    refuse_size(path, width, height)
    count = data.tobytes().count(b"ANMF")  # at least the number of frames
    video = shlex.quote(str(path.with_suffix(".mp4")))
    hint = with_commands("Make a video of it, for example:", f"magick {shlex.quote(str(path))} {video}")
    if width * height * count > MAX_PIXELS:
        raise InputError(f"{path} is too long to be read: {count} frames of {width}x{height}.", hint)
    try:
        good, animation = cv2.imdecodeanimation(data[None])  # OpenCV 4 takes one row alone
    except cv2.error:
        good = False
    if not good or not animation.frames:
        raise InputError(f"{path} cannot be read as an animated WebP.", hint)
    frames: list[NDArray[Any]] = [np.asarray(frame) for frame in animation.frames]
    seconds = np.asarray(animation.durations, np.float64) / 1000
    rate = Fraction(len(frames) / float(seconds.sum())).limit_denominator(1001) if seconds.sum() else RATE
    notes = uneven(path, seconds, rate, 0.001)

    def read(k: int) -> Picture:
        rgb = frames[k][..., 2::-1]
        return over(rgb, frames[k][..., 3], WHITE) if frames[k].shape[2] == 4 else rgb

    if frames[0].shape[2] == 4 and frames[0][..., 3].min() < 255:
        notes.append(transparency_note(path, frames[0][..., 3], "white"))
    stills = Stills(path, len(frames), rate, read, notes)
    if any(note.code == "variable_rate" for note in notes):
        stills.times = np.cumsum(seconds) - seconds
    return stills
