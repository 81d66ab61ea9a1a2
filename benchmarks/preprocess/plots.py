"""Plots of `trt-wan bench preprocess`, as PNG and SVG, with their units and the hardware."""

from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trt_wan.benchmarks.preprocess.result import PreprocessResult, WholeTimes
from trt_wan.benchmarks.report.plots import EXCESS, INK, LEAST, OTHER, canvas, readable, save

# Neighbours in a bar can be told apart, and a part has the same colour in both modes.
COLOURS = {
    "decode": "#1b6ca8",
    "detect": "#5aa5d8",
    "pose": "#a8d0ec",
    "scale frames": "#d3dde6",
    "SAM2": "#f2a65a",
    "shape masks": "#f7cfa3",
    "crop faces": "#7fb685",
    "draw skeleton": "#4e8d5a",
    "draw preview": "#b9d9bd",
    "cut background": "#c77dba",
    "encode": "#8b5fa3",
    "wait for frames and masks": "#f0c05a",
    "wait for a clip": "#c4b1d4",
    "finish clips": "#6b4f7f",
    "wait for the last frames": "#43324f",
}
NARROW = 0.04  # of the longest bar: parts under it have no figure of their own
LINE = 88  # characters


def draw(result: PreprocessResult, folder: Path) -> list[Path]:
    """Frames per second of each network, and what a whole preprocessing is made of."""
    found = save(rates(result), folder / "preprocess-networks")
    if result.whole:
        found += save(whole(result), folder / "preprocess-whole")
    return found


def _under(result: PreprocessResult) -> str:
    """Beside the axes there is less room than `canvas` wraps lines for."""
    return "\n".join([result.title, *wrap(result.about_random, LINE)])


def rates(result: PreprocessResult) -> Figure:
    figure, axes = canvas(
        f"Frames per second of each network (median of {result.networks[0].seconds.count} runs)",
        _under(result),
        height=2.2 + 0.6 * len(result.networks),
    )
    most = max(max(n.rate, n.by_arrays_rate or 0) for n in result.networks)
    for y, n in enumerate(result.networks):
        for dy, rate, colour in ((-0.19, n.rate, LEAST), (0.19, n.by_arrays_rate, OTHER)):
            if rate is None:
                continue
            axes.barh(y + dy, rate, 0.36, color=colour)
            place = (rate, y + dy)
            axes.annotate(readable(rate), place, (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.barh(0, 0, color=LEAST, label="from pictures to results, work on the host included")
    axes.barh(0, 0, color=OTHER, label="prepared float arrays in, raw ones out")
    axes.set_yticks(
        range(len(result.networks)), [f"{n.name}\n{n.title}" for n in result.networks], fontsize=8
    )
    axes.set_ylim(len(result.networks) - 0.5, -0.5)
    axes.set_xlim(0, most * 1.12)
    axes.set_xlabel("frames per second")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def whole(result: PreprocessResult) -> Figure:
    """Of each mode one bar of parts, stages opened, and one of the whole command."""
    first = result.whole[0]
    figure, axes = canvas(
        f"A whole preprocessing: {first.frames} frames (medians of {first.seconds.count} runs)",
        _under(result),
        width=10,
        height=3.1 + 0.9 * len(result.whole),
    )
    longest = max(max(w.seconds.median, w.command.median) for w in result.whole)
    labels = []
    for i, w in enumerate(result.whole):
        _stacked(axes, 2 * i, w, longest)
        axes.barh(2 * i + 1, w.command.median, 0.7, color=INK)
        for y, seconds in ((2 * i, w.seconds.median), (2 * i + 1, w.command.median)):
            at, text = (max(seconds, 0), y), f"{readable(seconds)} s, {readable(w.frames / seconds)} frames/s"
            axes.annotate(text, at, (5, 0), textcoords="offset points", va="center", fontsize=9)
        labels += [f"{w.mode}\nstages opened", f"{w.mode}\nwhole command"]
    used = [
        name for name in COLOURS if any(p.name == name and p.seconds for w in result.whole for p in w.parts)
    ]
    for name in used:
        axes.barh(0, 0, color=COLOURS[name], label=name)
    axes.barh(0, 0, color=OTHER, label="rest")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.25)
    axes.set_xlabel("seconds; parts are those of the thread that makes the folder")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=6)
    return figure


def _stacked(axes: Axes, y: int, w: WholeTimes, longest: float) -> None:
    left = 0.0
    parts = [(part.name, part.seconds, COLOURS.get(part.name, EXCESS)) for part in w.parts if part.seconds]
    for _, seconds, colour in (*parts, ("rest", w.rest, OTHER)):
        axes.barh(y, seconds, 0.7, left=left, color=colour)
        if seconds > NARROW * longest:
            axes.annotate(readable(seconds), (left + seconds / 2, y), ha="center", va="center", fontsize=7)
        left += seconds
