"""`--frames`: every frame as a PNG in a folder, beside the video: 00000.png, 00001.png, …

The folder is `<name>.partial` until all frames are there, or `<name>.partial-2` and so on, as the video is
named (target.py). After a stopped job it stays.
"""

import os
import re
import shutil
from pathlib import Path

from trt_wan.errors import OutputError
from trt_wan.runtime.video.pictures import write_picture
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.target import explained

NUMBERED = re.compile(r"\d{5,}\.png")


class FrameFolder:
    """`finish()` makes the final folder."""

    def __init__(
        self, path: Path, overwrite: bool = False, first: int = 0, unfinished: str = "partial"
    ) -> None:
        """Makes the working folder `<name>.<unfinished>` in place of an earlier one, or with `first` goes on
        from that frame.

        Raises OutputError, also for an earlier frame that is missing.
        """
        require_free(path, overwrite, unfinished)
        self.path, self.frames = path, first
        self.partial = path.with_name(f"{path.name}.{unfinished}")
        there = {file.name for file in self.partial.iterdir()} if self.partial.is_dir() else set()
        kept = {_name(number) for number in range(first)}
        if missing := kept - there:
            raise OutputError(
                f"{self.partial} lacks {min(missing)}, and the video goes on from frame {first}.",
                "Leave out --frames, or begin anew.",
            )
        with explained(path):
            if not first:
                _remove(self.partial)
                self.partial.mkdir()
            for name in there - kept if first else ():
                (self.partial / name).unlink()

    def write(self, frame: Picture) -> None:
        """Adds one picture [H, W, 3]."""
        with explained(self.path):
            write_picture(self.partial / _name(self.frames), frame)
        self.frames += 1

    def finish(self) -> Path:
        with explained(self.path):
            _remove(self.path)
            os.replace(self.partial, self.path)
        return self.path


def _name(number: int) -> str:
    return f"{number:05}.png"


def require_free(path: Path, overwrite: bool, unfinished: str = "partial") -> None:
    """Raises OutputError for a folder that may not be replaced: only one of numbered PNGs can be."""
    if not path.name or not path.parent.is_dir() or (path.exists() and not path.is_dir()):
        raise OutputError(
            f"{path} cannot be a folder of frames.", "Name a folder that can be made in one that exists."
        )
    for folder in (path, path.with_name(f"{path.name}.{unfinished}")):
        there = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        if others := [name for name in there if not NUMBERED.fullmatch(name)]:
            raise OutputError(
                f"{folder} has other files than frames in it, such as {sorted(others)[0]}.",
                "Name another folder with --frames.",
            )
        if there and folder == path and not overwrite:
            raise OutputError(
                f"{path} has {len(there)} frames in it already.",
                "Name another folder, or add -y to replace them.",
            )


def _remove(folder: Path) -> None:
    """The folder, which has numbered frames alone."""
    if folder.is_dir():
        shutil.rmtree(folder)
