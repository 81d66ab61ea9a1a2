"""The frames of a camera's render, of the size of the video and as many (runtime/camera.py).

Frame k belongs to frame k of the video. A video of the user's that is shorter holds its last frame, a longer
one is cut, and another shape is scaled to cover the frame and cut at its edges.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from trt_wan.errors import InputError
from trt_wan.runtime.camera import Camera, Move, homography
from trt_wan.runtime.events import Note
from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.stills import AnyClip, open_clip


@dataclass(frozen=True)
class Render:
    frames: Callable[[Sequence[int]], Picture]  # [n, H, W, 3] by number in the video
    still: bool  # all frames are the same
    key: Callable[[Sequence[int]], Hashable]  # decides the bits of those frames
    notes: Sequence[Note] = field(default=())


@contextmanager
def opened_render(
    camera: Camera | None, reference: Picture, size: tuple[int, int], frames: int, history: int
) -> Iterator[Render | None]:
    """The render of a video of `size` (width, height) and `frames`; None without a camera. A file is read in
    windows of `history` frames. Raises InputError.
    """
    if camera is None:
        yield None
    elif isinstance(camera.render, Path):
        with open_clip(camera.render, history, one=True) as clip:
            yield _of_clip(clip, size, frames)
    else:
        yield _made(camera.render, letterbox(reference, *size), frames)


def require_render(camera: Camera) -> None:
    """Raises InputError for a file that cannot be read."""
    if isinstance(camera.render, Path):
        open_clip(camera.render, one=True).close()


def _made(move: Move, canvas: Picture, frames: int) -> Render:
    digest = hashlib.blake2b(canvas.tobytes()).digest()
    if move == "static":  # the same latent as the reference's
        return Render(
            lambda numbers: np.stack([canvas] * len(numbers)), True, lambda _: ("reference", digest)
        )

    def made(numbers: Sequence[int]) -> Picture:
        return np.stack([moved(canvas, move, number / max(frames - 1, 1)) for number in numbers])

    return Render(made, frames == 1, lambda numbers: ("camera", move, digest, frames, tuple(numbers)))


def moved(canvas: Picture, move: Move, done: float) -> Picture:
    """The picture [H, W, 3] as the camera sees it where `done` 0 to 1 of its path is behind; black holes."""
    if not done:
        return canvas
    height, width = canvas.shape[:2]
    made = cv2.warpPerspective(canvas, homography(move, done, width, height), (width, height))
    return np.asarray(made, np.uint8)


def _of_clip(clip: AnyClip, size: tuple[int, int], frames: int) -> Render:
    notes, path = [], clip.path
    if 1 < clip.frames != frames:
        held = clip.frames < frames
        what = "its last frame is held" if held else "the rest of it is not used"
        text = f"{path.name} has {clip.frames} frames for a video of {frames}: {what}."
        notes.append(Note(text, "camera_length", {"file": str(path), "frames": clip.frames, "video": frames}))
    if clip.width * size[1] != clip.height * size[0]:
        text = (
            f"{path.name} is {clip.width}x{clip.height}: it is scaled to cover {size[0]}x{size[1]} and cut."
        )
        notes.append(Note(text, "camera_size", {"file": str(path)}))
    file = path.stat()
    identity = "camera", file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, size

    def held_at_end(numbers: Sequence[int]) -> list[int]:
        return [min(number, clip.frames - 1) for number in numbers]

    def made(numbers: Sequence[int]) -> Picture:
        return np.stack([covering(picture, *size) for picture in clip.window(held_at_end(numbers))])

    return Render(made, clip.frames == 1, lambda numbers: (*identity, tuple(held_at_end(numbers))), notes)


def covering(picture: Picture, width: int, height: int) -> Picture:
    """[h, w, 3] scaled to cover [height, width, 3], centred, and cut at its edges."""
    h, w = picture.shape[:2]
    if (h, w) == (height, width):
        return picture
    factor = max(width / w, height / h)
    scaled = max(width, round(w * factor)), max(height, round(h * factor))
    if max(scaled) > 1 << 14:
        raise InputError(
            f"The camera's file is {w}x{h}, too narrow for a video of {width}x{height}.", "Cut it."
        )
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    made = cv2.resize(picture, scaled, interpolation=interpolation)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return np.ascontiguousarray(made[top : top + height, left : left + width])
