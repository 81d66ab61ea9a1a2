"""Pictures and videos as people hold them in Python, to the files that the runtime reads.

Arrays have values of 0 to 255 (integers), 0 to 1 (floats) or true and false; channels come last, or second as
in torch. They are written without loss.
"""

from collections.abc import Iterable
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import UsageError, shown
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.video.pictures import write_picture

Media = Any  # a path, an array, a PIL picture, or for videos a list of arrays or pictures


def picture_file(media: Media, name: str, folder: Path) -> Path:
    """The path of a picture; one that is no path is written to `folder`. `name` is the argument's."""
    if isinstance(media, str | PathLike):
        return Path(media)
    frames = _frames(np.asarray(media)[None], name)
    path = folder / f"{name}.png"
    write_picture(path, frames[0])
    return path


def video_file(media: Media, name: str, folder: Path, rate: Fraction) -> Path:
    """The path of a video; frames are written to `folder`, at `rate`. Raises UsageError."""
    if isinstance(media, str | PathLike):
        return Path(media)
    if isinstance(media, Iterable) and not hasattr(media, "__array__"):
        media = [np.asarray(frame) for frame in media]
        if len({frame.shape for frame in media}) > 1:
            raise UsageError(f"The frames of {name} have different sizes.", "Give frames of one size.")
    frames = _frames(np.asarray(media), name)
    path = folder / f"{name}.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _frames(array: NDArray[Any], name: str) -> Pixels:
    """uint8 [F, H, W, 3]. Raises UsageError."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3, 4) or not array.size:
        raise UsageError(
            f"{name} has the shape {shown(str(array.shape))}, which is no video of RGB frames.",
            f"Give {name} as frames [F, H, W, 3], a list of pictures, or the path of a file.",
        )
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (0 <= low and high <= 1):
            raise UsageError(
                f"{name} has floats from {low:g} to {high:g}, and pictures have 0 to 1.",
                "Scale them, or give integers of 0 to 255.",
            )
        array = np.rint(array.astype(np.float32) * 255)
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype.kind not in "ui" or array.min() < 0 or array.max() > 255:
        raise UsageError(
            f"{name} has values of type {array.dtype} that are no levels of 0 to 255.",
            "Give uint8 of 0 to 255, or floats of 0 to 1.",
        )
    pixels = np.ascontiguousarray(array.astype(np.uint8))
    if pixels.shape[3] == 1:
        return np.repeat(pixels, 3, axis=3)
    if pixels.shape[3] == 4:
        if pixels[..., 3].min() < 255:
            raise UsageError(
                f"{name} has transparent pixels.", "Put it on a background first, or give the path of a PNG."
            )
        return np.ascontiguousarray(pixels[..., :3])
    return pixels


def as_pil(frames: Pixels) -> list[Any]:
    """PIL pictures. Raises UsageError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            "Pillow is not installed.", 'Install it with pip, or use output_type="np".'
        ) from error
    return [Image.fromarray(frame) for frame in frames]
