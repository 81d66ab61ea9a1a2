"""Plots that read well: figures fit into their parts, and labels do not lie on each other."""

from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from trt_wan.benchmarks.report.plots import Bar, bars, speed_up


def drawn(figure: Any) -> tuple[Any, list[Any]]:
    """The axes and the boxes of its annotations, in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    return axes, [text.get_window_extent(canvas.get_renderer()) for text in axes.texts if text.get_text()]


@pytest.mark.parametrize("beside", ["", "35.6 s, 2.14 frames/s"])
def test_a_part_shows_its_figure_where_it_fits(beside: str) -> None:
    """Parts of 2 to 12 % of a bar, with figures of three to five characters."""
    groups = {}
    for k in range(40):
        first = 0.05 + 0.005 * k
        groups[f"a window of a long video {k}"] = [
            Bar([("condition", first, "C0"), ("step", 2 - first, "C1"), ("decode", 0.001, "C2")], beside)
        ]
    axes, boxes = drawn(bars("Windows", "made up", groups, "seconds"))
    parts = [patch.get_window_extent() for patch in axes.patches if patch.get_width() > 0]
    inside = [box for box in boxes if any(part.x0 < box.x0 and box.x1 < part.x1 for part in parts)]
    outside = [] if not beside else [box for box in boxes if box not in inside]
    assert len(outside) == (len(groups) if beside else 0) and len(inside) + len(outside) == len(boxes)
    assert len(groups) < len(inside) < 2 * len(groups), (
        "some figures fit into the first part, and some do not"
    )


def test_the_last_points_have_labels_apart() -> None:
    ups = {
        "step": [(1, 1.0), (2, 1.85), (4, 3.59)],
        "window": [(1, 1.0), (2, 1.84), (4, 3.58)],
        "step, large": [(1, 1.0), (2, 1.88)],
        "window, large": [(1, 1.0), (2, 1.87)],
    }
    axes, boxes = drawn(speed_up("Speed-up", "made up", ups))
    assert sorted(text.get_text() for text in axes.texts) == ["1.87", "1.88", "3.58", "3.59"]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
