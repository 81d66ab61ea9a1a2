"""Reads pictures: any bit depth, grey, palettes, transparency, turned as their EXIF says.

OpenCV decodes. Sizes are checked in the header first, so that a few kilobytes cannot ask for gigabytes.
"""

import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import InputError, with_commands
from trt_wan.runtime.video.container import MAX_PIXELS, READING, refuse_missing, refuse_size
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.transparency import Colour, over

WHITE: Colour = (255, 255, 255)
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
CHUNK_FRAME = 12  # bytes of a PNG's chunk beside its content: length, name, checksum
HEADER_ONLY = {**READING, "skip_frame": "all"}
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Transparent:
    """A picture [H, W, 3] and its opacity [H, W]: uint8, None for an opaque picture."""

    pixels: Picture
    opacity: Picture | None

    def over(self, behind: Colour) -> Picture:
        return self.pixels if self.opacity is None else over(self.pixels, self.opacity, behind)


def read_picture(path: Path, behind: Colour = WHITE) -> Picture:
    """uint8 RGB [H, W, 3], upright, in front of `behind` where it is transparent; grey as three equal
    channels, 16 bits as their high 8. Raises InputError.
    """
    return read_transparent(path).over(behind)


def read_transparent(path: Path) -> Transparent:
    """As `read_picture`, with the opacity apart. Colours under full transparency are those of the file."""
    refuse_missing(path)
    fixed = shlex.quote(str(path.with_suffix(".fixed.png")))
    unreadable = InputError(
        f"{path} cannot be read as a picture.",
        with_commands("Convert it to PNG:", f"ffmpeg -i {shlex.quote(str(path))} -frames:v 1 {fixed}"),
    )
    try:
        # Unlike numpy, cv2.imread cannot open a path outside the code page on Windows.
        data = np.fromfile(path, np.uint8)
        _refuse_header(path, data, unreadable.hint)
        if _is_cut_short(data):
            raise unreadable
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
        opacity = _opacity(path, data)
    except (cv2.error, OSError) as error:
        raise unreadable from error
    if picture is None:
        raise unreadable
    return Transparent(np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8), opacity)


def write_picture(path: Path, pixels: Picture) -> None:
    """A PNG of RGB [H, W, 3] or grey [H, W]."""
    shown = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    path.write_bytes(cv2.imencode(".png", shown)[1].tobytes())


def _refuse_header(path: Path, data: NDArray[np.uint8], hint: str) -> None:
    """PNG's own header, because ffmpeg decodes the whole picture for it. Raises InputError."""
    head = data[:24].tobytes()
    if head.startswith(PNG) and len(head) == 24:
        refuse_size(path, *struct.unpack(">II", head[16:]))
        return
    try:
        with av.open(str(path.absolute()), metadata_errors="ignore", options=HEADER_ONLY) as container:
            codec = container.streams.video[0].codec_context if container.streams.video else None
    except (av.FFmpegError, OSError):
        return  # OpenCV knows other formats, and has a limit of its own of four times as many pixels
    if codec is not None and codec.width and codec.height:
        refuse_size(path, codec.width, codec.height)
    elif codec is not None:  # ffmpeg does not say which
        raise InputError(
            f"{path} cannot be read as a picture: its header is damaged, or it has more than "
            f"{MAX_PIXELS} pixels.",
            hint,
        )


def _is_cut_short(data: NDArray[np.uint8]) -> bool:
    """Whether it is a PNG with a chunk that ends after the file. OpenCV takes gigabytes for such a chunk."""
    content = data.data
    at = len(PNG)
    if bytes(content[:at]) != PNG:
        return False
    while at < len(content) and bytes(content[at + 4 : at + 8]) != b"IEND":
        at += CHUNK_FRAME + int.from_bytes(content[at : at + 4])
    return at >= len(content)


def _opacity(path: Path, data: NDArray[np.uint8]) -> Picture | None:
    """None where no pixel is transparent."""
    if data[:3].tobytes() == JPEG:
        return None
    pixels: NDArray[Any]
    pixels, kinds, blobs = cv2.imdecodeWithMetadata(data, flags=cv2.IMREAD_UNCHANGED)
    if pixels is None:
        return None
    if pixels.ndim == 2 and b"tRNS" in data.tobytes().partition(b"IDAT")[0]:
        # OpenCV forgets the one transparent grey.
        with av.open(str(path.absolute())) as container:
            pixels = next(container.decode(video=0)).reformat(format="rgba").to_ndarray()
    if pixels.ndim == 2 or pixels.shape[2] != 4 or pixels.dtype not in (np.uint8, np.uint16):
        return None
    levels = pixels[..., 3].astype(np.uint16)
    opacity = (levels if pixels.dtype == np.uint8 else levels >> 8).astype(np.uint8)
    if opacity.min() == 255:
        return None
    exif = next(
        (bytes(blob) for kind, blob in zip(kinds, blobs, strict=True) if kind == cv2.IMAGE_METADATA_EXIF), b""
    )
    return _upright(opacity, orientation(exif))


def orientation(exif: bytes) -> int:
    """1 to 8, as the EXIF standard numbers them; 1 where nothing is said."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for k in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * k)
            if tag == ORIENTATION:
                return int(value)
    except struct.error:
        pass
    return 1


def _upright(picture: NDArray[Any], how: int) -> NDArray[Any]:
    picture = picture.T if how in (5, 6, 7, 8) else picture
    rows = -1 if how in (3, 4, 7, 8) else 1
    columns = -1 if how in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(picture[::rows, ::columns])
