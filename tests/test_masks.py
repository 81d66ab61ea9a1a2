"""Masks: golden values of the official code, the wrapper's rule, and what ours are for: no latent cell is
half known, in any window of the generator."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from trt_wan.errors import UsageError
from trt_wan.preprocess.pictures.masks import (
    Compat,
    Mask,
    MaskShape,
    bounding_box,
    fill_holes,
    grid_blocks,
    grow,
    kijai_blocks,
    official_blocks,
    official_grow,
    shared_runs,
)
from trt_wan.runtime.conditioning import known_mask
from trt_wan.runtime.windows import Windows

WIDTH, HEIGHT = 832, 480


def ellipse(centre: tuple[int, int], axes: tuple[int, int], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Mask:
    picture = np.zeros((size[1], size[0]), np.uint8)
    cv2.ellipse(picture, centre, axes, 0, 0, 360, 1, -1)
    return picture.astype(bool)


def walking_person(frames: int) -> list[Mask]:
    """Crosses the canvas, swaying and changing size: nothing about it sits on any grid."""
    return [
        ellipse((200 + 7 * t, 240 + int(9 * np.sin(t))), (55 + t % 5, 150 + int(8 * np.cos(t / 3))))
        for t in range(frames)
    ]


def cells(mask: Mask) -> NDArray[np.bool_]:
    """[h, w, 64]: the pixels of each latent cell."""
    h, w = mask.shape[0] // 8, mask.shape[1] // 8
    return mask.reshape(h, 8, w, 8).transpose(0, 2, 1, 3).reshape(h, w, 64)


def known_but_partly_black(mask: Mask) -> int:
    """Cells with hole in them that the generator takes for known: it reads the top left pixel."""
    return int((~mask[::8, ::8] & cells(mask).any(axis=2)).sum())


def unknown_but_partly_background(mask: Mask) -> int:
    return int((mask[::8, ::8] & ~cells(mask).all(axis=2)).sum())


# --- No cell half known ----------------------------------------------------------------------------------


def test_the_wrappers_rule_leaves_about_47_cells_half_known() -> None:
    """kijai_semantics.md 4.5: 200 random ellipses of a person's size, 832x480, blocks of 32."""
    random = np.random.default_rng(0)
    half, other = [], []
    for _ in range(200):
        w, h = random.integers(40, 70), random.integers(100, 200)
        centre = (int(random.integers(w, WIDTH - w)), int(random.integers(h, HEIGHT - h)))
        outline = ellipse(centre, (int(w), int(h)))
        mask = kijai_blocks(outline, 32)
        half.append(known_but_partly_black(mask))
        other.append(unknown_but_partly_background(mask))
        ours = grid_blocks(outline, 32)
        assert known_but_partly_black(ours) == unknown_but_partly_background(ours) == 0
    assert np.mean(half) == pytest.approx(47, abs=2) and np.mean(other) == pytest.approx(46, abs=2)


@pytest.mark.parametrize("block", [16, 32, 48])
def test_no_cell_of_a_moving_person_is_half_known(block: int) -> None:
    outlines = walking_person(26)
    masks = list(MaskShape(block=block).of(outlines, 26))
    assert len(masks) == 26 and all(mask.any() and not mask.all() for mask in masks)
    for outline, mask in zip(outlines, masks, strict=True):
        assert known_but_partly_black(mask) == unknown_but_partly_background(mask) == 0
        assert not (grow(outline, 10) & ~mask).any(), "the person shows"
    theirs = MaskShape(block=block, compat="kijai").of(outlines, 26)
    assert np.mean([known_but_partly_black(mask) for mask in theirs]) > 20


def half_known_over_time(numbers: NDArray[np.int_], windows: Windows) -> int:
    """Latents with known and unknown frames, among those that decode to a frame of the output.

    `numbers` says which mask each frame has: frame k of the clip paints column numbers[k], nothing else.
    """
    size = int(numbers.max()) + 1
    person = np.zeros((windows.clip_frames, 16, 16 * size), np.float32)
    for k, number in enumerate(numbers):
        person[k, :, 16 * number : 16 * number + 16] = 1
    count = 0
    for j in range(windows.total):
        known = known_mask(windows.overlap if j else 0, person[windows.indices(j), ::8, ::8])
        kept = windows.keep(j)
        latents = {0 if frame == 0 else (frame + 3) // 4 for frame in range(kept.start, kept.stop)}
        count += sum(int((known[:, t] != known[:1, t]).any()) for t in latents)
    return count


@pytest.mark.parametrize(("window", "overlap"), [(77, 1), (77, 5), (13, 1), (13, 5), (9, 5), (5, 1)])
def test_frames_of_a_latent_share_their_mask_in_every_window(window: int, overlap: int) -> None:
    worse = 0
    for frames in range(1, 100):
        runs = shared_runs(frames)
        assert sum(runs) == frames
        windows = Windows(frames, window, overlap)
        ours = np.repeat(np.arange(len(runs)), runs)
        assert half_known_over_time(ours, windows) == 0, f"{frames} frames, runs {runs}"
        plain = np.maximum(np.arange(frames) + 3, 0) // 4  # latents, without a thought for the clip's end
        worse += half_known_over_time(plain, windows)
    assert worse > 0, "the end of the clip needs no care, then"


def test_masks_are_shared_as_the_runs_say() -> None:
    assert [shared_runs(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 77)] == [
        *([1], [2], [3], [1, 3], [1, 4], [1, 5], [1, 6], [1, 4, 3], [1] + [4] * 19)
    ]
    outlines = walking_person(8)
    masks = list(MaskShape(grow=0, block=16).of(outlines, 8))
    for frames in ([0], [1, 2, 3, 4], [5, 6, 7]):
        union = grid_blocks(np.logical_or.reduce([outlines[k] for k in frames]), 16)
        assert all(np.array_equal(masks[k], union) for k in frames)


def test_little_is_read_ahead() -> None:
    read = 0

    def outlines() -> object:
        nonlocal read
        for outline in [ellipse((30, 30), (8, 20), (64, 64))] * 103:
            read += 1
            yield outline

    ahead = [read - k for k, _ in enumerate(MaskShape().of(outlines(), 103))]  # type: ignore[arg-type]
    assert max(ahead) <= 6


# --- Golden values ---------------------------------------------------------------------------------------


def test_official_masks() -> None:
    """preprocess_golden.json, `mask`. Its source is not in the file; this one has all its numbers."""
    picture = np.zeros((128, 128), np.uint8)
    cv2.circle(picture, (70, 40), 14, 1, -1)
    picture[50:80, 64:76] = 1
    source = picture.astype(bool)
    assert source.sum() == 925
    grown = official_grow(source)
    assert grown.sum() == 2743 and bounding_box(grown) == (47, 17, 93, 88)
    for across, down, area in ((1, 1, 3315), (4, 6, 3261), (10, 20, 2885)):
        blocks = official_blocks(grown, across, down)
        assert blocks.sum() == area and bounding_box(blocks) == (47, 17, 93, 88)
    (whole,) = MaskShape(compat="official").of([source], 1)
    assert whole.sum() == 3315


def test_wrapper_blocks_of_a_137x367_box() -> None:
    """kijai_semantics.md 4.3: 4 x 11 blocks of 34 x 33 pixels, the last ones 35 wide and 37 high."""
    outline = np.zeros((480, 832), bool)
    x0, y0 = 101, 57
    outline[[y0, y0 + 366], [x0, x0 + 136]] = True  # the corners alone
    mask = kijai_blocks(outline, 32)
    expected = np.zeros_like(outline)
    expected[y0 : y0 + 33, x0 : x0 + 34] = True
    expected[y0 + 330 : y0 + 367, x0 + 102 : x0 + 137] = True
    assert np.array_equal(mask, expected)
    outline[y0 + 34, x0 + 40] = True
    expected[y0 + 33 : y0 + 66, x0 + 34 : x0 + 68] = True
    assert np.array_equal(kijai_blocks(outline, 32), expected)


def test_wrapper_chain_grows_ten_then_blocks_each_frame_alone() -> None:
    outlines = walking_person(3)
    masks = list(MaskShape(compat="kijai").of(outlines, 3))
    assert all(
        np.array_equal(mask, kijai_blocks(grow(outline, 10), 32))
        for mask, outline in zip(masks, outlines, strict=True)
    )
    assert not np.array_equal(masks[1], masks[2])


# --- Parts -----------------------------------------------------------------------------------------------


def test_grow_is_a_diamond_and_shrinks() -> None:
    point = np.zeros((21, 21), bool)
    point[10, 10] = True
    y, x = np.mgrid[:21, :21]
    diamond = abs(y - 10) + abs(x - 10)
    assert np.array_equal(grow(point, 4), diamond <= 4)
    assert np.array_equal(grow(grow(point, 6), -2), diamond <= 4)
    assert np.array_equal(grow(point, 0), point)


def test_holes_are_filled_and_bays_are_not() -> None:
    mask = np.zeros((12, 12), bool)
    mask[0:8, 0:8] = True
    mask[2:5, 2:5] = False  # a hole
    mask[6, 4:8] = False  # a bay, open to the right
    filled = fill_holes(mask)
    assert filled[2:5, 2:5].all() and not filled[6, 4:8].any() and not filled[8:, :].any()
    assert filled.sum() == mask.sum() + 9
    assert fill_holes(np.ones((4, 4), bool)).all() and not fill_holes(np.zeros((4, 4), bool)).any()
    with_hole = [cv2.circle(np.zeros((64, 64), np.uint8), (32, 32), 28, 1, 3).astype(bool)]
    shape = {"grow": 0, "block": 16}
    assert not next(MaskShape(**shape).of(with_hole, 1))[32, 32]
    assert next(MaskShape(**shape, fill=True).of(with_hole, 1))[32, 32]


def test_blocks_at_the_edges_of_a_canvas_that_they_do_not_divide() -> None:
    mask = np.zeros((48, 80), bool)
    mask[47, 79] = True
    blocks = grid_blocks(mask, 32)
    assert blocks.shape == mask.shape and bounding_box(blocks) == (64, 32, 79, 47) and blocks.sum() == 16 * 16


@pytest.mark.parametrize("compat", [None, "official", "kijai"])
def test_a_frame_without_a_person_has_an_empty_mask(compat: Compat | None) -> None:
    """One dot as well: the official code and the wrapper divide by its size."""
    dot = np.zeros((32, 32), bool)
    dot[5, 5] = True
    empty = np.zeros((32, 32), bool)
    shape = MaskShape(compat=compat)
    for outline in (empty, dot):
        masks = list(shape.of([outline] * 6, 6))
        assert len(masks) == 6 and all(mask.shape == (32, 32) for mask in masks)
        assert all(mask.any() == outline.any() for mask in masks)
    for blocks in (official_blocks(dot, 10, 20), kijai_blocks(dot, 32)):
        assert np.array_equal(blocks, dot)


@pytest.mark.parametrize(
    ("options", "says", "fix"),
    [
        ({"block": 20}, "A block of 20 pixels does not fit", "--block 16 or --block 32"),
        ({"block": 0}, "A block of 0 pixels does not fit", "--block 16 or --block 32"),
        ({"block": -32}, "A block of -32 pixels does not fit", "--block 16 or --block 32"),
        ({"block": 1024}, "A block of 1024 pixels hides", "--block 16 to --block 512"),
        ({"grow": -1}, "A mask cannot grow by -1 pixels", "--grow 0 to --grow 512"),
        ({"grow": 513, "compat": "kijai"}, "A mask cannot grow by 513 pixels", "--grow 0 to --grow 512"),
        ({"block": 4, "compat": "kijai"}, "A block of 4 pixels is not possible", "--block 8 to --block 512"),
        ({"block": 32, "compat": "official"}, "one rectangle", "--compat official"),
        ({"grow": 3, "compat": "official"}, "one rectangle", "--compat official"),
    ],
)
def test_shapes_that_cannot_be(options: dict[str, object], says: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        MaskShape(**options)  # type: ignore[arg-type]
    assert says in caught.value.message and fix in caught.value.hint
