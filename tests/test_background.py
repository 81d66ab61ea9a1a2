"""The hole, and the way back over it."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from trt_wan.preprocess.clips.artifacts import CRF, PRESET
from trt_wan.preprocess.pictures.background import cut_hole
from trt_wan.preprocess.pictures.masks import Mask
from trt_wan.runtime.paste_back import paste_back, pasted_back
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.reader import Picture
from trt_wan.runtime.video.writer import VideoWriter


@pytest.fixture
def frame() -> Picture:
    return np.random.default_rng(1).integers(1, 256, (64, 96, 3), np.uint8)


@pytest.fixture
def mask() -> Mask:
    mask = np.zeros((64, 96), bool)
    mask[16:48, 32:64] = True
    return mask


def test_the_hole_is_black_and_nothing_else_changes(frame: Picture, mask: Mask) -> None:
    before = frame.copy()
    cut = cut_hole(frame, mask)
    assert cut.dtype == np.uint8 and not cut[mask].any()
    assert np.array_equal(cut[~mask], frame[~mask]) and np.array_equal(frame, before)
    assert np.array_equal(cut_hole(frame, np.zeros_like(mask)), frame)


def test_paste_back_keeps_the_painted_person_and_the_original_pixels(frame: Picture, mask: Mask) -> None:
    painted = np.full_like(frame, 200)
    out = paste_back(painted, frame, mask, soft_edge=8)
    y, x = np.mgrid[:64, :96]
    away = np.maximum(
        np.maximum(16 - y, y - 47), np.maximum(32 - x, x - 63)
    )  # in straight lines from the box
    assert out.dtype == np.uint8 and (out[mask] == 200).all()
    far = (away > 8) & ~mask
    assert far.any() and np.array_equal(out[far], frame[far])
    row = out[30, 63:73].astype(float)
    weight = np.clip(1 - np.arange(10) / 9, 0, 1)[:, None]
    assert np.abs(row - (200 * weight + frame[30, 63:73] * (1 - weight))).max() <= 0.5 + 1e-4


def test_paste_back_reads_nothing_of_the_hole(frame: Picture, mask: Mask) -> None:
    """The background clip with its black hole serves as the original."""
    painted = np.full_like(frame, 90)
    assert np.array_equal(paste_back(painted, cut_hole(frame, mask), mask), paste_back(painted, frame, mask))


def test_paste_back_without_a_mask_and_with_nothing_else(frame: Picture, mask: Mask) -> None:
    painted = np.zeros_like(frame)
    assert np.array_equal(paste_back(painted, frame, np.zeros_like(mask)), frame)
    assert np.array_equal(paste_back(painted, frame, np.ones_like(mask)), painted)
    hard = paste_back(painted, frame, mask, soft_edge=0)
    assert np.array_equal(hard, np.where(mask[..., None], painted, frame))


def test_a_video_is_pasted_back_frame_by_frame(frame: Picture, mask: Mask, tmp_path: Path) -> None:
    """With prepared clips: the masks move, and far from them the clip's own pixels come out."""
    masks = [np.roll(mask, 16 * k, axis=1) for k in range(3)]
    smooth = np.full_like(frame, (90, 140, 60))
    for name, pictures in (
        ("bg.mp4", [cut_hole(smooth, m) for m in masks]),
        ("mask.mp4", [np.repeat(m[..., None] * np.uint8(255), 3, axis=2) for m in masks]),
    ):
        with VideoWriter(
            tmp_path / name, 96, 64, Fraction(10), quality=Quality(crf=CRF, preset=PRESET)
        ) as writer:
            for picture in pictures:
                writer.write(picture)
            writer.finish()
    painted = [np.full_like(frame, 40 * k) for k in range(3)]
    done = list(pasted_back(painted, tmp_path / "bg.mp4", tmp_path / "mask.mp4"))
    assert len(done) == 3
    for k, picture in enumerate(done):
        assert (picture[masks[k]] == 40 * k).all()
        assert abs(picture[:, :14].astype(int) - smooth[:, :14]).max() <= 3
