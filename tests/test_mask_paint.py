"""Masks corrected by a painted picture, against loops over pixels."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from made_clips import RATE, FakeSegmenter, make, write_clip
from numpy.typing import NDArray

from trt_wan.errors import InputError, UsageError
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.pictures.masks import Compat, Mask, MaskShape, shared_runs
from trt_wan.preprocess.pictures.paint import read_paint
from trt_wan.runtime.video.reader import Clip, Picture

CANVAS = (192, 96)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mkv", 7)


def read(path: Path) -> Picture:
    with Clip(path) as clip:
        return np.concatenate([clip.window([k]) for k in range(clip.frames)])


def painted(path: Path, size: tuple[int, int] = (45, 31)) -> NDArray[np.uint8]:
    """RGBA noise in spots: every brightness with every opacity, and large areas of each kind."""
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 256, (size[1], size[0], 4), np.uint8)
    third = size[0] // 3
    picture[:, :third, 3] = 0
    picture[5:12, 2:9] = 255
    picture[:, -third:] = (0, 0, 0, 255)
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGBA2BGRA))
    return picture


def slow_paint(mask: Mask, picture: NDArray[np.uint8]) -> Mask:
    """Pixel by pixel."""
    out, (height, width), (rows, columns) = mask.copy(), mask.shape, picture.shape[:2]
    for y in range(height):
        for x in range(width):
            row, column = int((y + 0.5) * rows / height), int((x + 0.5) * columns / width)
            red, green, blue, opacity = (int(value) for value in picture[row, column])
            if opacity >= 128:
                out[y, x] = round(0.299 * red + 0.587 * green + 0.114 * blue) >= 128
    return out


def slow_masks(outlines: list[Mask], picture: NDArray[np.uint8], pixels: int, block: int) -> list[Mask]:
    def grown(mask: Mask) -> Mask:
        ys, xs = np.nonzero(mask)
        y, x = np.indices(mask.shape)
        near = np.zeros_like(mask)
        for row, column in zip(ys, xs, strict=True):
            near |= abs(y - row) + abs(x - column) <= pixels
        return near

    corrected = [slow_paint(grown(outline), picture) for outline in outlines]
    masks, at = [], 0
    for run in shared_runs(len(outlines)):
        mask = np.zeros_like(outlines[0])
        for y in range(0, mask.shape[0], block):
            for x in range(0, mask.shape[1], block):
                part = np.s_[y : y + block, x : x + block]
                mask[part] = any(outline[part].any() for outline in corrected[at : at + run])
        masks += [mask] * run
        at += run
    return masks


class Spots(FakeSegmenter):
    """A small spot that moves, so that the slow version ends."""

    def outlines(self, frames: object, people: object) -> object:
        for k, _ in enumerate(frames):
            mask = np.zeros(CANVAS[::-1], bool)
            mask[40:60, 100 + 5 * k : 110 + 5 * k] = True
            yield mask


def test_masks_and_holes_follow_the_painting(clip: Path, tmp_path: Path) -> None:
    picture = painted(tmp_path / "paint.png")
    options = {"mode": "replace", "rate": RATE, "mask": MaskShape(grow=6, block=16)}
    plain = read(make(tmp_path, clip, segmenter=Spots(), **options) / "src_mask.mp4")[..., 0] > 127
    out = make(
        tmp_path, clip, segmenter=Spots(), **options, mask_paint=tmp_path / "paint.png", overwrite=True
    )
    outlines = list(Spots().outlines(range(7), None))
    masks = read(out / "src_mask.mp4")[..., 0] > 127
    assert np.array_equal(masks, slow_masks(outlines, picture, 6, 16))
    assert (masks & ~plain).any() and (plain & ~masks).any(), "it has added and taken away"
    backgrounds = read(out / "src_bg.mp4")
    for mask, background in zip(masks, backgrounds, strict=True):
        assert background[mask].mean() < 1.5 and (background[~mask].max(axis=1) > 30).all()


@pytest.mark.parametrize("compat", [None, "official", "kijai"])
def test_each_rule_takes_the_corrected_outline(tmp_path: Path, compat: Compat | None) -> None:
    """A spot far from the person widens the blocks; where all is taken away nothing is left."""
    outline = np.zeros(CANVAS[::-1], bool)
    outline[32:48, 32:48] = True
    spot, everything = np.zeros((2, 24, 48, 4), np.uint8)
    spot[5, 41], everything[...] = 255, (0, 0, 0, 255)
    everything[0, 0, 3] = 0
    shape = MaskShape(compat=compat)
    for name, picture in (("spot", spot), ("everything", everything)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture)
    (plain,) = shape.of([outline], 1)
    (wider,) = shape.of([outline], 1, read_paint(tmp_path / "spot.png", CANVAS).over)
    (none,) = shape.of([outline], 1, read_paint(tmp_path / "everything.png", CANVAS).over)
    assert not (plain & ~wider).any() and wider[20:24, 164:168].all() and not plain[20:24, 164:168].any()
    assert not none.any()


def test_paintings_that_cannot_be(clip: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "opaque.png"), np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(InputError, match="no transparent pixels") as error:
        make(tmp_path, clip, mode="replace", mask_paint=tmp_path / "opaque.png")
    assert "transparent where the mask should stay" in (error.value.hint or "")
    with pytest.raises(UsageError, match="no mask, so --mask-paint"):
        PreprocessJob(Path("r"), Path("c"), Path("o"), mask_paint=Path("p"))
    black = np.full((20, 20, 4), (0, 0, 0, 255), np.uint8)
    black[0, 0, 3] = 127
    cv2.imwrite(str(tmp_path / "black.png"), black)
    with pytest.raises(InputError, match="No outline") as error:
        make(tmp_path, clip, segmenter=Spots(), mode="replace", mask_paint=tmp_path / "black.png")
    assert "less black" in (error.value.hint or "") and not (tmp_path / "out").exists()
