"""The folder of prepared clips: names of its files, their quality, and how they appear.

Files are made in a hidden folder inside the output folder and moved when all are complete, src_ref.png last.
A folder without src_ref.png does not count as prepared clips.
"""

import os
import shlex
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from trt_wan.errors import OutputError
from trt_wan.runtime.video.target import missing_parents

REFERENCE = "src_ref.png"
REFERENCE_MASK = "src_ref_mask.png"  # the opacity of a transparent reference
POSE = "src_pose.mp4"
FACE = "src_face.mp4"
BACKGROUND = "src_bg.mp4"
MASK = "src_mask.mp4"
PREVIEW = "preview.mp4"
KEYPOINTS = "keypoints.json"
ALL = (POSE, FACE, BACKGROUND, MASK, PREVIEW, KEYPOINTS, REFERENCE_MASK, REFERENCE)

# x264. Masks of 16-pixel blocks survive it exactly. At 18 the hole's edge in the background rings.
CRF = 10
PREVIEW_CRF = 20
PRESET = "veryfast"  # these files are read once or twice: half the time of "medium", a little larger


MAKING = ".making-"  # how the name of the hidden folder begins


def remove_leftovers(path: Path) -> None:
    """Removes the hidden folders of killed processes. Call while no other process makes clips in `path`."""
    for making in path.glob(f"{MAKING}*"):
        shutil.rmtree(making, ignore_errors=True)


class ArtifactFolder:
    """A context manager. Files are made in `making`, and `publish()` moves them to `path`.

    Without `publish()` all new files are removed, and files that were in `path` before stay unchanged.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        require_new(path, overwrite)
        self.path = path
        self._made = missing_parents(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.making = Path(tempfile.mkdtemp(prefix=MAKING, dir=path))
        except OSError as error:
            self._remove_made()
            raise OutputError(
                f"The folder {path} cannot be written to ({error.strerror}).",
                "Choose a folder that you can write to.",
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


def require_new(path: Path, overwrite: bool) -> None:
    """Raises OutputError if the folder has prepared clips that may not be overwritten."""
    there = [name for name in ALL if (path / name).exists()]
    if there and not overwrite:
        raise OutputError(
            f"{path} has {', '.join(there)} already.",
            "Choose another folder, add -y to replace them, or give them to run with "
            f"--inputs {shlex.quote(str(path))}",
        )
