"""From the outline of a person to the blocks that the model repaints.

A mask is bool [H, W] of the canvas, true on the person. The model gets one value per latent cell (8x8 pixels
of 4 frames) and reads cells in patches of 16x16 pixels. A mask that follows the outline would declare cells
known that contain part of the hole. The default mask cannot: its blocks lie on the canvas's 16-pixel grid,
and all frames of a latent share one mask. `compat` selects the blocks of the official code or of the wrapper.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import UsageError

Mask = NDArray[np.bool_]
Compat = Literal["official", "kijai"]

GRID = 16  # pixels: a patch of the transformer, two latent cells
FRAMES_PER_LATENT = 4  # except the first frame of a clip, which is one latent
GROW, BLOCK = 10, 32  # pixels, as in the wrapper's example workflow
MOST = 512  # pixels, of either: more hides the whole picture
OFFICIAL_KERNEL, OFFICIAL_ITERATIONS = 7, 3


@dataclass(frozen=True)
class MaskShape:
    """How an outline becomes the mask: filled, grown by `grow` pixels, in blocks of `block` pixels.

    Raises UsageError on construction.
    """

    grow: int | None = None  # None: the rule's default
    block: int | None = None
    fill: bool = False  # closes enclosed holes, such as between an arm on a hip and the body
    compat: Compat | None = None

    def __post_init__(self) -> None:
        if self.compat == "official":
            if self.grow is not None or self.block is not None:
                raise UsageError(
                    "The official mask is one rectangle around the person and has no grow or block size.",
                    "Leave out --grow and --block, or --compat official.",
                )
            return
        if self.grow is not None and not 0 <= self.grow <= MOST:
            raise UsageError(
                f"A mask cannot grow by {self.grow} pixels: a smaller mask shows the person's edge, "
                "a much larger one hides all.",
                f"Use --grow 0 to --grow {MOST}.",
            )
        block = BLOCK if self.block is None else self.block
        if self.compat == "kijai" and not 8 <= block <= MOST:
            raise UsageError(
                f"A block of {block} pixels is not possible with the wrapper's rule.",
                f"Use --block 8 to --block {MOST}.",
            )
        if self.compat is None and block > MOST:
            raise UsageError(
                f"A block of {block} pixels hides the whole picture.",
                f"Use --block {GRID} to --block {MOST}.",
            )
        if self.compat is None and (block < GRID or block % GRID):
            below = max(GRID, block // GRID * GRID)
            raise UsageError(
                f"A block of {block} pixels does not fit the model's grid of {GRID} pixels.",
                f"Use --block {below} or --block {below + GRID}.",
            )

    def of(
        self, outlines: Iterable[Mask], frames: int, corrected: Callable[[Mask], Mask] = lambda mask: mask
    ) -> Iterator[Mask]:
        """The masks of a clip of `frames` frames. Reads at most six outlines ahead.

        `corrected` changes a grown outline before it becomes blocks, so that they stay on the model's grid.
        """
        if self.compat == "official":
            grown = (corrected(official_grow(self._filled(outline))) for outline in outlines)
            return (official_blocks(outline) for outline in grown)
        pixels = GROW if self.grow is None else self.grow
        block = BLOCK if self.block is None else self.block
        grown = (corrected(grow(self._filled(outline), pixels)) for outline in outlines)
        if self.compat == "kijai":
            return (kijai_blocks(outline, block) for outline in grown)
        return shared_blocks(grown, frames, block)

    def _filled(self, outline: Mask) -> Mask:
        return fill_holes(outline) if self.fill else outline


def as_picture(mask: Mask) -> NDArray[np.uint8]:
    """RGB, white inside."""
    white = mask.view(np.uint8) * np.uint8(255)
    return np.asarray(cv2.merge((white, white, white)), np.uint8)


def grow(mask: Mask, pixels: int) -> Mask:
    """Grows the mask by a diamond of that radius. A negative radius shrinks it."""
    if pixels == 0:
        return mask
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    change = cv2.dilate if pixels > 0 else cv2.erode
    return np.asarray(change(mask.astype(np.uint8), cross, iterations=abs(pixels)), bool)


def fill_holes(mask: Mask) -> Mask:
    """Adds every region that the mask encloses. Touching corners do not enclose."""
    outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
    cv2.floodFill(outside, None, (0, 0), 2, flags=8)
    return np.asarray(outside[1:-1, 1:-1] != 2, bool)


def shared_runs(frames: int) -> list[int]:
    """Lengths of the runs of frames that share one mask: 1, 4, 4, ... as latents do.

    A window of 4k+1 frames that carries over 1 or 5 starts at a multiple of 4, and frame 0 of a later window
    is carried over, so these runs hold for every window. Past its end a clip is read backwards: a last latent
    with one or two new frames also contains frames of the previous run, so the two runs are merged.
    """
    last = (frames - 1) % FRAMES_PER_LATENT
    runs = [1] + [FRAMES_PER_LATENT] * ((frames - 1) // FRAMES_PER_LATENT)
    if last in (1, 2):
        runs[-1] += last
    elif last:
        runs.append(last)
    return runs


def shared_blocks(outlines: Iterable[Mask], frames: int, block: int) -> Iterator[Mask]:
    """One mask per run of frames: every block of the canvas's grid with a pixel of any of their outlines."""
    coming = iter(outlines)
    for run in shared_runs(frames):
        together = np.logical_or.reduce(list(islice(coming, run)))
        mask = grid_blocks(together, block)
        yield from [mask] * run


def grid_blocks(mask: Mask, block: int) -> Mask:
    """Fills every block with a pixel of the mask. Blocks count from the canvas's top left corner."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % block), (0, -width % block)))
    rows, columns = padded.shape[0] // block, padded.shape[1] // block
    filled = padded.reshape(rows, block, columns, block).any(axis=(1, 3))
    return filled.repeat(block, 0).repeat(block, 1)[:height, :width]


def kijai_blocks(mask: Mask, block: int) -> Mask:
    """The wrapper's rule: the bounding box in equal parts of `block` to 2*block pixels, the last larger."""
    box = bounding_box(mask)
    if box is None:
        return mask
    x0, y0, x1, y1 = box
    columns, rows = _parts(x0, x1 + 1, block), _parts(y0, y1 + 1, block)
    out = np.zeros_like(mask)
    for top, bottom in rows:
        for left, right in columns:
            out[top:bottom, left:right] = mask[top:bottom, left:right].any()
    return out


def official_grow(mask: Mask, kernel: int = OFFICIAL_KERNEL, iterations: int = OFFICIAL_ITERATIONS) -> Mask:
    square = np.ones((kernel, kernel), np.uint8)
    return np.asarray(cv2.dilate(mask.astype(np.uint8), square, iterations=iterations), bool)


def official_blocks(mask: Mask, across: int = 1, down: int = 1) -> Mask:
    """The official rule: the bounding box in about across x down cells. A cell with any pixel is filled.

    The last column and row stay unchanged, and a cell sees the fill of earlier cells (preprocess_spec.md A3).
    With the defaults the mask is the whole box.
    """
    box = bounding_box(mask)
    if box is None:
        return mask
    x0, y0, x1, y1 = box
    width, height = max(1, (x1 - x0) // across), max(1, (y1 - y0) // down)
    out = mask.copy()
    for left in range(x0, x1, width):
        for top in range(y0, y1, height):
            cell = out[top : min(top + height, y1), left : min(left + width, x1)]
            cell[...] = cell.any()
    return out


def bounding_box(mask: Mask) -> tuple[int, int, int, int] | None:
    """First and last column and row with a pixel: x0, y0, x1, y1. None for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _parts(start: int, end: int, block: int) -> list[tuple[int, int]]:
    count = max(1, (end - start) // block)
    size = (end - start) // count
    edges = [start + size * k for k in range(count)] + [end]
    return list(zip(edges[:-1], edges[1:], strict=True))
