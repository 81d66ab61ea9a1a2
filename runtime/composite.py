"""Several views of one character on one canvas: uint8 [height, width, 3], sizes and places in pixels."""

from collections.abc import Iterator, Sequence

import numpy as np

from trt_wan.runtime.letterbox import letterbox
from trt_wan.runtime.video.reader import Picture

STRIP = 1 / 3  # part of the canvas beside the main view, at least
MOST_AREA = 0.5  # the largest other view, as a part of the main view
TOKEN = 16  # pixels of a token: views share none

Box = tuple[int, int, int, int]  # left, top, width, height


def composite(views: Sequence[Picture], width: int, height: int) -> Picture:
    """All views on one black canvas, whole and in their shapes; the first is the largest."""
    if len(views) == 1:
        return letterbox(views[0], width, height)
    canvas = np.zeros((height, width, 3), np.uint8)
    sizes = [(view.shape[1], view.shape[0]) for view in views]
    for view, (left, top, w, h) in zip(views, layout(sizes, width, height), strict=True):
        canvas[top : top + h, left : left + w] = letterbox(view, w, h)
    return canvas


def layout(sizes: Sequence[tuple[int, int]], width: int, height: int) -> list[Box]:
    """The places of views of `sizes` (width, height), the main one first.

    The others share a strip at the right of the main view or below it: all room that the main view leaves
    free there, or STRIP of the canvas. Taken is the layout with the largest main view, and of equal ones that
    with the largest others.
    """
    turned = [(h, w) for w, h in sizes]
    below = [[(y, x, w, h) for x, y, h, w in boxes] for boxes in _beside(turned, height, width)]
    return max([*_beside(sizes, width, height), *below], key=_value)


def _value(boxes: Sequence[Box]) -> tuple[float, float]:
    main, *others = (float(w * h) for _, _, w, h in boxes)
    return round(main, -2), min(others)  # 100 pixels are rounding


def _beside(sizes: Sequence[tuple[int, int]], width: int, height: int) -> Iterator[list[Box]]:
    """Layouts with the strip at the right: the others one above another, and side by side."""
    main, *others = sizes
    free = width - _fitted(main, width, height)[0]
    strip = _whole_tokens(min(max(free, width * STRIP), width - 1))
    box = _centred(main, 0, 0, width - strip, height)
    area = box[2] * box[3] * MOST_AREA
    for across in (False, True):
        size = strip if across else height
        cuts = [_whole_tokens(size * k / len(others)) for k in range(len(others))] + [size]
        made = [box]
        for view, start, stop in zip(others, cuts, cuts[1:], strict=False):
            room = max(1, stop - start)
            cell = (width - strip + start, 0, room, height) if across else (width - strip, start, strip, room)
            made.append(_centred(view, *cell, area))
        yield made


def _whole_tokens(size: float) -> int:
    return int(size) // TOKEN * TOKEN or int(size)


def _fitted(size: tuple[int, int], width: float, height: float) -> tuple[int, int]:
    scale = min(width / size[0], height / size[1])
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _centred(
    size: tuple[int, int], left: int, top: int, width: int, height: int, area: float | None = None
) -> Box:
    """A view in the middle of a cell, of at most `area` pixels."""
    w, h = _fitted(size, width, height)
    if area is not None and w * h > area:
        part = (area / (w * h)) ** 0.5
        w, h = _fitted(size, w * part, h * part)
    return left + (width - w) // 2, top + (height - h) // 2, w, h
