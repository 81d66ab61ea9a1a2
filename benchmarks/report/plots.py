"""Plots as PNG and SVG: bars and points. Every plot names its units and the hardware."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from trt_wan.benchmarks.report.times import StepTimes
from trt_wan.engines.store.files import named

INK, LEAST, EXCESS, OTHER = "#222222", "#1b6ca8", "#f2a65a", "#9aa5b1"
GRID = "#dddddd"
ORDER = ("patch_embed", "attn_in", "attention", "attn_out", "cross_attention", "ffn", "fuser", "head")
DIGIT, BESIDE = 0.0088, 0.012  # widths of a part's figure, a character and the rest, relative to the axis
APART = 0.035  # labels at one place on the x-axis, relative to the y-axis
NEAR = 1.08  # points nearer than this in x share a label


@dataclass(frozen=True)
class Bar:
    """Parts side by side, each with its legend ("" for none), length and colour."""

    parts: Sequence[tuple[str, float, str]]
    text: str = ""
    start: float = 0.0
    spread: tuple[float, float] | None = None  # p10 and p90

    @property
    def end(self) -> float:
        return self.start + sum(length for _, length, _ in self.parts)


def save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    with rc_context({"svg.fonttype": "none"}):  # text stays text: it can be searched and copied
        for path in paths:
            with named(path):
                figure.savefig(path, dpi=150)
    return paths


def canvas(title: str, under: str, width: float = 9, height: float = 5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    axes.set_title("\n".join(fill(line, 100) for line in under.splitlines()), fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def readable(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bars(
    title: str, under: str, groups: Mapping[str, Sequence[Bar]], x_label: str, line: float | None = None
) -> Figure:
    """Horizontal bars, one group per name. `line` is dashed across all of them."""
    count = sum(len(group) for group in groups.values())
    figure, axes = canvas(title, under, height=2.2 + 0.4 * count)
    all_bars = [bar for group in groups.values() for bar in group]
    longest = max(bar.end for bar in all_bars)
    # Figures beside the bars need room.
    most = max(longest, line or 0) * (1.25 if any(bar.text for bar in all_bars) else 1.02)
    legends: dict[str, str] = {}
    for i, group in enumerate(groups.values()):
        thick = 0.8 / len(group)
        for j, bar in enumerate(group):
            y, left = i + (j - (len(group) - 1) / 2) * thick, bar.start
            for name, length, colour in bar.parts:
                legends[name] = colour
                edge = "white" if colour != "none" else "none"  # tells a part from the next one like it
                axes.barh(y, length, thick * 0.9, left=left, color=colour, edgecolor=edge, linewidth=0.4)
                if len(bar.parts) > 2 and length > most * (DIGIT * len(readable(length)) + BESIDE):
                    middle = (left + length / 2, y)
                    axes.annotate(readable(length), middle, ha="center", va="center", fontsize=7)
                left += length
            if bar.spread is not None:
                low, high = bar.spread
                whiskers = [[bar.end - low], [high - bar.end]]
                axes.errorbar(bar.end, y, xerr=whiskers, color=INK, capsize=3)
            end = max(bar.end, *(bar.spread or (0.0,)))
            axes.annotate(bar.text, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
    for name, colour in legends.items():
        if name:
            axes.barh(0, 0, color=colour, label=name)
    if any(legends):
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    if line is not None:
        axes.axvline(line, color=LEAST, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, most)
    axes.set_xlabel(x_label)
    return figure


def waterfall(under: str, steps: StepTimes) -> Figure:
    """Each network's time in a step beginning where the one before ends, with the least it can take."""
    by_name = {n.name: n for n in steps.networks}
    names = [name for name in ORDER if name in by_name] + [name for name in by_name if name not in ORDER]
    groups: dict[str, list[Bar]] = {}
    top = 0.0
    for name in names:
        network = by_name[name]
        seconds = network.seconds * 1e3
        least = min((network.bound_seconds or 0.0) * 1e3, seconds)
        parts = (("least it can take", least, LEAST), ("beyond that", seconds - least, EXCESS))
        groups[f"{name}, {network.calls} x"] = [Bar(parts, readable(seconds), top)]
        top += seconds
    whole = steps.profiled_seconds * 1e3
    groups["between networks"] = [Bar([("no network runs", whole - top, OTHER)], readable(whole - top), top)]
    groups["whole step"] = [Bar([("", whole, INK)], readable(whole))]
    bound = steps.bound_seconds * 1e3 if steps.bound_seconds else None
    title = f"One denoising step: {readable(steps.seconds.median * 1e3)} ms"
    return bars(
        title + (f", lower bound {readable(bound)} ms" if bound else ""),
        f"{under}\nlower bound: {steps.bound_about}\nbars: a step timed network by network, which takes "
        f"{readable(whole)} ms",
        groups,
        "milliseconds of one step, added up",
        bound,
    )


def scaling(
    title: str,
    under: str,
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    law: tuple[str, Callable[[float], float]] | None = None,
) -> Figure:
    """Seconds per step over growing work, both axes logarithmic. Points are (x, seconds, label)."""
    figure, axes = canvas(title, under)
    for (name, points), colour in zip(series.items(), (LEAST, EXCESS), strict=False):
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        axes.plot(xs, ys, "o", color=colour, label=name, markersize=6)
    everything = sorted(point for points in series.values() for point in points)
    for k, (x, y, labels) in enumerate(_together(everything)):
        above = k % 2 == 0  # labels stand on both sides of a rising line
        axes.annotate(
            "\n".join(labels),
            (x, y),
            (-7, 5) if above else (7, -5),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            fontsize=7.5,
        )
    if law is not None:
        xs = [x for x, _, _ in everything]
        axes.plot(xs, [law[1](x) for x in xs], "--", color=INK, linewidth=1, label=law[0])
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel="seconds per step, median")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.margins(0.12, 0.16)
    axes.grid(True, which="major", color=GRID, linewidth=0.6)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    return figure


def speed_up(title: str, under: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Times one GPU's speed over the number of GPUs, beside the line of N GPUs that are N times as fast."""
    figure, axes = canvas(title, under)
    counts = sorted({gpus for points in series.values() for gpus, _ in points})
    axes.plot(counts, counts, "--", color=INK, linewidth=1, label="N times")
    ends: dict[int, list[tuple[float, Any]]] = {}  # the last points by GPUs, with their colours
    for name, points in series.items():
        if points:
            line = axes.plot(*zip(*points, strict=True), "o-", label=name)[0]
            ends.setdefault(points[-1][0], []).append((points[-1][1], line.get_color()))
    least_gap = APART * (axes.get_ylim()[1] - axes.get_ylim()[0])
    for gpus, known in ends.items():
        highest = math.inf
        for times, colour in sorted(known, key=lambda end: -end[0]):
            highest = min(times, highest - least_gap)
            below = -3 if gpus == counts[-1] else -12  # other lines go on, and rise
            place: Any = {"xy": (gpus, highest), "xytext": (8, below), "textcoords": "offset points"}
            axes.annotate(f"{times:.2f}", **place, fontsize=8, color=colour)
    axes.set_xticks(counts)
    axes.set(xlabel="GPUs", ylabel="times as fast as one")
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _together(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, list[str]]]:
    """Points in the order of x; points on top of each other are one, with several labels."""
    found: list[tuple[float, float, list[str]]] = []
    for x, y, label in points:
        if found and x <= found[-1][0] * NEAR:
            found[-1][2].append(label)
        else:
            found.append((x, y, [label]))
    return found


def errors_by_step(title: str, under: str, rows: Mapping[str, Sequence[float]]) -> Figure:
    """Relative errors over the steps, the error axis logarithmic."""
    figure, axes = canvas(title, under, height=4)
    colours = chain((LEAST, OTHER), (f"C{k}" for k in count()))
    for (name, errors), colour in zip(rows.items(), colours, strict=False):
        label = name if any(errors) else f"{name}: no difference"
        axes.plot(range(1, len(errors) + 1), errors, "o-", color=colour, label=label)
    known = [error for errors in rows.values() for error in errors if error]
    if known:
        axes.set_yscale("log")
        axes.set_ylim(10 ** math.floor(math.log10(min(known))), 10 ** math.ceil(math.log10(max(known))))
    axes.set_xticks(range(1, max(map(len, rows.values())) + 1))
    axes.set(xlabel="denoising step", ylabel="relative error")
    axes.grid(True, axis="y", color=GRID, linewidth=0.6)
    axes.legend(frameon=False)
    return figure
