"""Pictures of every kind against PIL, which reads them on its own; and sizes that are refused early."""

import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from test_video import difference

from trt_wan.errors import InputError, UsageError
from trt_wan.runtime.video.pictures import orientation, read_picture, read_transparent
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.transparency import colour

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (40, 60, 3), np.uint8)
OPACITY = np.zeros((40, 60), np.uint8)
OPACITY[10:30, 15:45], OPACITY[10:30, 14] = 255, 100
RGBA = np.dstack([RGB, OPACITY])
TURNED = Image.Exif()
TURNED[0x0112] = 6


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def sixteen_bits(path: Path, kind: int, channels: NDArray[np.uint8]) -> None:
    deep = (channels.astype(">u2") * 257).astype(">u2")
    path.write_bytes(png(60, 40, 16, kind, b"".join(b"\0" + row.tobytes() for row in deep)))


def palette() -> Image.Image:
    return Image.fromarray(RGB).quantize(64)


# What PIL writes, except for 16 bits, of which it has only grey.
KINDS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "rgba": (".png", lambda path: Image.fromarray(RGBA).save(path)),
    "grey and alpha": (".png", lambda path: Image.fromarray(RGBA[..., 2:], "LA").save(path)),
    "palette": (".png", lambda path: palette().save(path)),
    "palette with one clear colour": (".png", lambda path: palette().save(path, transparency=3)),
    "palette with soft colours": (".png", lambda path: palette().save(path, transparency=bytes(range(64)))),
    "a clear colour": (
        ".png",
        lambda path: Image.fromarray(RGB).save(path, transparency=tuple(RGB[0, 0].tolist())),
    ),
    "a clear grey": (
        ".png",
        lambda path: Image.fromarray(RGB[..., 0]).save(path, transparency=int(RGB[0, 0, 0])),
    ),
    "black and white": (".png", lambda path: Image.fromarray(RGB).convert("1").save(path)),
    "rgb": (".png", lambda path: Image.fromarray(RGB).save(path)),
    "webp": (".webp", lambda path: Image.fromarray(RGBA).save(path, lossless=True, exact=True)),
    "turned": (".png", lambda path: Image.fromarray(RGBA).save(path, exif=TURNED)),
    "turned and opaque": (".png", lambda path: Image.fromarray(RGB).save(path, exif=TURNED)),
    "turned webp": (
        ".webp",
        lambda path: Image.fromarray(RGBA).save(path, exif=TURNED, lossless=True, exact=True),
    ),
    "gif": (".gif", lambda path: Image.fromarray(RGBA).save(path)),
}


def put_over(rgba: Picture, behind: tuple[int, int, int]) -> Picture:
    part = rgba[..., 3:].astype(float) / 255
    return np.rint(rgba[..., :3] * part + np.array(behind) * (1 - part)).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behind", [(255, 255, 255), (0, 177, 64)])
def test_hidden_colours_do_not_show(tmp_path: Path, kind: str, behind: tuple[int, int, int]) -> None:
    suffix, write = KINDS[kind]
    path = tmp_path / f"picture{suffix}"
    write(path)
    want = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGBA"))
    assert difference(read_picture(path, behind), put_over(want, behind)) <= 1
    opacity = read_transparent(path).opacity
    if want[..., 3].min() == 255:
        assert opacity is None
    else:
        assert opacity is not None and difference(opacity, want[..., 3]) == 0


@pytest.mark.parametrize(
    ("kind", "channels"), [(6, RGBA), (4, RGBA[..., 2:]), (2, RGB), (0, RGB[..., :1])], ids=str
)
def test_sixteen_bits(tmp_path: Path, kind: int, channels: NDArray[np.uint8]) -> None:
    path = tmp_path / "deep.png"
    sixteen_bits(path, kind, channels)
    alpha = channels[..., -1:] if kind & 4 else np.full((40, 60, 1), 255, np.uint8)
    colours = channels[..., :3] if kind & 2 else np.repeat(channels[..., :1], 3, 2)
    want = put_over(np.dstack([colours, alpha]), (255, 255, 255))
    assert difference(read_picture(path), want) <= 1


@pytest.mark.parametrize("how", range(1, 9))
def test_all_orientations_of_transparent_pictures(tmp_path: Path, how: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = how
    Image.fromarray(RGBA).save(tmp_path / "p.png", exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "p.png")))
    assert difference(read_picture(tmp_path / "p.png"), put_over(want, (255, 255, 255))) <= 1


def test_exif_that_is_cut_says_nothing() -> None:
    good = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00"
    assert orientation(good) == 6
    assert {orientation(good[:k]) for k in range(20)} == {1}


@pytest.mark.parametrize("size", [(30_000, 20_000), (20_000, 20), (0xFFFF_FFFF, 1)])
def test_a_picture_that_is_too_large_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png(*size, 8, 2, bytes(1000)))
    start = time.perf_counter()
    with pytest.raises(InputError, match=f"is {size[0]}x{size[1]}; at most 16384 pixels a side"):
        read_picture(tmp_path / "bomb.png")
    assert time.perf_counter() - start < 1


def test_a_jpeg_that_is_too_large_is_refused_by_its_header(tmp_path: Path) -> None:
    content = bytearray(cv2.imencode(".jpg", RGB)[1].tobytes())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    (tmp_path / "bomb.jpg").write_bytes(content)
    with pytest.raises(InputError, match="more than 134217728 pixels|at most 16384 pixels a side"):
        read_picture(tmp_path / "bomb.jpg")


@pytest.mark.parametrize("size", [(1, 1), (15, 400)])
def test_a_picture_that_shows_nothing_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    cv2.imwrite(str(tmp_path / "dot.png"), np.zeros((size[1], size[0], 3), np.uint8))
    with pytest.raises(InputError, match=f"is {size[0]}x{size[1]}; at least 16 pixels a side"):
        read_picture(tmp_path / "dot.png")


def test_colours() -> None:
    assert colour("White") == (255, 255, 255) and colour("#00b140") == (0, 177, 64)
    for wrong in ("", "#fff", "#gggggg", "hwite", "255,255,255"):
        with pytest.raises(UsageError, match="is not a colour"):
            colour(wrong)
