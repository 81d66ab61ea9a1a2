"""Small inputs with which tests/fuzz.py ended a reader, kept as they were found or cut down."""

import resource
import time
from pathlib import Path

import pytest
from made_clips import write_clip, write_reference

from trt_wan.errors import InputError
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.video.reader import Clip


@pytest.mark.parametrize("name", [b"xxxx", b"\0\0\0\0", b"fpcm"])
def test_a_clip_of_an_unknown_codec(tmp_path: Path, name: bytes) -> None:
    """PyAV has no decoder for the stream, and so no codec context."""
    path = write_clip(tmp_path / "c.mp4", 6, (64, 48), codec="libx264")
    path.write_bytes(path.read_bytes().replace(b"avc1", name))
    with pytest.raises(InputError) as caught:
        Clip(path)
    assert str(path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 5000])
def test_a_png_whose_chunk_is_longer_than_the_file(tmp_path: Path, length: int) -> None:
    """OpenCV takes 2 GB and 10 s for it."""
    path = write_reference(tmp_path / "c.png", (64, 48))
    content = path.read_bytes()
    at = content.index(b"IDAT") - 4
    path.write_bytes(content[:at] + length.to_bytes(4) + content[at + 4 :])
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"c\.png cannot be read as a picture"):
        read_picture(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000 and time.perf_counter() - start < 3, f"{grown} KB"


@pytest.mark.parametrize("more", [b"", b"behind the end"])
def test_a_whole_png_is_read(tmp_path: Path, more: bytes) -> None:
    path = write_reference(tmp_path / "c.png", (64, 48))
    path.write_bytes(path.read_bytes() + more)
    assert read_picture(path).shape == (48, 64, 3)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(InputError):
        read_picture(path)
