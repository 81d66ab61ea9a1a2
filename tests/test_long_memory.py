"""Host memory does not grow with the length of the video: memory_by_length.py at a small size."""

from pathlib import Path

import pytest
from memory_by_length import peak, write_clips

SIZE = 208, 128
SHORT, LONG = 60, 260
FRAME = SIZE[0] * SIZE[1] * 3 * 4  # bytes of float32; 64 MB for all that LONG has more


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = tmp_path_factory.mktemp("lengths")
    return {frames: write_clips(base / str(frames), frames, *SIZE) for frames in (SHORT, LONG)}


@pytest.mark.parametrize("mode", ["loop", "hybrid"])
def test_memory_does_not_grow_with_length(folders: dict[int, Path], mode: str) -> None:
    short, long = (peak(folders[frames], mode, short=True) for frames in (SHORT, LONG))
    assert long - short < (LONG - SHORT) * FRAME / 3
