"""Host memory does not grow with the length of the video: memory_by_length.py at a small size."""

import gc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from av.video.stream import VideoStream
from memory_by_length import peak, write_clips

from trt_wan.runtime.video.writer import VideoWriter

SIZE = 208, 128
SHORT, LONG = 60, 260
FRAME = SIZE[0] * SIZE[1] * 3 * 4  # bytes of float32; 64 MB for all that LONG has more


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = tmp_path_factory.mktemp("lengths")
    return {frames: write_clips(base / str(frames), frames, *SIZE) for frames in (SHORT, LONG)}


@pytest.mark.parametrize("mode", ["loop", pytest.param("hybrid", marks=pytest.mark.long)])
def test_memory_does_not_grow_with_length(folders: dict[int, Path], mode: str) -> None:
    short, long = (peak(folders[frames], mode, "--short", "--unwritten") for frames in (SHORT, LONG))
    assert long - short < (LONG - SHORT) * FRAME / 3


def test_encoders_of_earlier_windows_are_freed(tmp_path: Path) -> None:
    """Each takes 8 MB at 832x480. They were freed when Python happened to look for cycles."""
    gc.disable()
    try:
        with VideoWriter(tmp_path / "out.mp4", *SIZE, Fraction(25)) as writer:
            for _ in range(12):
                writer.write(np.zeros((SIZE[1], SIZE[0], 3), np.uint8))
                writer.settle()
            live = sum(isinstance(made, VideoStream) for made in gc.get_objects())
            writer.finish()
    finally:
        gc.enable()
    assert live < 8
