"""Plots of results, as PNG and SVG. Every one names its units and the hardware."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from trt_wan.benchmarks.measure.quality import Quality
from trt_wan.benchmarks.measure.sweep import Point, Sweep
from trt_wan.benchmarks.report.result import OURS, Result

INK, LEAST, EXCESS, OTHER = "#222222", "#1b6ca8", "#f2a65a", "#9aa5b1"
ORDER = (
    "patch_embed",
    "attn_in",
    "attention",
    "attn_out",
    "cross_attention",
    "ffn",
    "fuser",
    "head",
    "sampler",
)


def draw(result: Result, folder: Path) -> list[Path]:
    """Waterfall of a step, stages of a job, and seconds per step beside the peers'."""
    figures = {"waterfall": waterfall(result), "stages": stages(result)}
    if any(peer.ran for peer in result.peers):
        figures["peers"] = peers(result)
    return [path for name, figure in figures.items() for path in save(figure, folder / name)]


def save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    with rc_context({"svg.fonttype": "none"}):  # text stays text: it can be searched and copied
        for path in paths:
            figure.savefig(path, dpi=150)
    return paths


def canvas(title: str, hardware: str, width: float = 9, height: float = 5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    lines = [fill(line, 110) for line in hardware.splitlines()]
    axes.set_title("\n".join(lines), fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def readable(value: float) -> str:
    """Three figures, and no more of them than a plot has room for."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def waterfall(result: Result) -> Figure:
    """Each network's time in a step on top of the one before; of each, the least it can take."""
    steps = result.steps
    by_name = {n.name: n for n in steps.networks}
    names = [name for name in ORDER if name in by_name]
    names += [name for name in by_name if name not in ORDER]
    factor = 1e3
    whole = steps.profiled_seconds
    bound = f", lower bound {readable(steps.bound_seconds * factor)} ms" if steps.bound_seconds else ""
    figure, axes = canvas(
        f"One denoising step: {readable(steps.seconds.median * factor)} ms{bound}",
        f"{result.title}\nlower bound: {steps.bound_about}\nbars: a step that is timed network by network, "
        f"which takes {readable(whole * factor)} ms",
    )
    top = 0.0
    for x, name in enumerate(names):
        seconds = by_name[name].seconds * factor
        least = min(by_name[name].bound_seconds or 0.0, by_name[name].seconds) * factor
        axes.bar(x, least, 0.7, top, color=LEAST)
        axes.bar(x, seconds - least, 0.7, top + least, color=EXCESS)
        axes.annotate(readable(seconds), (x, top + seconds), (0, 3), textcoords="offset points", ha="center")
        top += seconds
    between = whole * factor - top
    x = len(names)
    axes.bar(x, between, 0.7, top, color=OTHER)
    axes.annotate(
        readable(between), (x, max(top, top + between)), (0, 3), textcoords="offset points", ha="center"
    )
    axes.bar(x + 1, whole * factor, 0.7, color=INK)
    axes.annotate(
        readable(whole * factor), (x + 1, whole * factor), (0, 3), textcoords="offset points", ha="center"
    )
    if steps.bound_seconds:
        axes.axhline(steps.bound_seconds * factor, color=LEAST, linestyle="--", linewidth=1)
    calls = [f"{name}\n{by_name[name].calls} x" for name in names]
    axes.set_xticks(range(len(names) + 2), [*calls, "between\nnetworks", "whole\nstep"], fontsize=8)
    axes.set_ylabel("milliseconds of one step, added up")
    axes.set_ylim(0, max(top, whole * factor) * 1.12)
    for colour, label in (
        (LEAST, "least it can take"),
        (EXCESS, "beyond that"),
        (OTHER, "no network running"),
    ):
        axes.bar(0, 0, color=colour, label=label)
    axes.legend(frameon=False, loc="upper left")
    return figure


def stages(result: Result) -> Figure:
    """Seconds of every stage of a whole job, from a warm and from a cold start."""
    jobs = [("warm start", result.warm, LEAST)]
    if result.cold is not None:
        jobs.append(("cold start", result.cold, EXCESS))
    names = [name for name in result.warm.stages]
    figure, axes = canvas(
        f"A whole job: one window of {result.warm.frames} frames, {len(result.warm.steps)} steps",
        result.title,
        height=1.6 + 0.42 * len(names),
    )
    thick = 0.8 / len(jobs)
    longest = max(max(job.stages.values()) for _, job, _ in jobs)
    for j, (label, job, colour) in enumerate(jobs):
        for i, name in enumerate(names):
            seconds = job.stages.get(name, 0.0)
            y = i + (j - (len(jobs) - 1) / 2) * thick
            axes.barh(y, seconds, thick * 0.9, color=colour, label=label if i == 0 else None)
            axes.annotate(
                f"{seconds:.2f}", (seconds, y), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_xlim(0, longest * 1.12)
    if len(jobs) > 1:
        axes.legend(frameon=False, loc="lower right")
    return figure


def peers(result: Result) -> Figure:
    """Median seconds per step, with p10 and p90, ours first."""
    rows = [(OURS, result.steps.seconds)]
    rows += [(peer.title, peer.seconds) for peer in result.peers if peer.seconds is not None]
    least = min(spread.count for _, spread in rows)
    figure, axes = canvas(
        f"Seconds per denoising step (median and p10 to p90 of {least} steps or more)",
        result.title,
        height=1.6 + 0.55 * len(rows),
    )
    for y, (name, spread) in enumerate(rows):
        whiskers = [[spread.median - spread.p10], [spread.p90 - spread.median]]
        colour = LEAST if name == OURS else OTHER
        axes.barh(y, spread.median, 0.65, color=colour, xerr=whiskers, ecolor=INK, capsize=3)
        text = f"{spread.median:.3g} s" + ("" if y == 0 else f"  ({spread.median / rows[0][1].median:.2f} x)")
        axes.annotate(text, (spread.p90, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
    if result.steps.bound_seconds:
        axes.axvline(result.steps.bound_seconds, color=LEAST, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step; dashed: the lower bound of ours")
    axes.set_xlim(0, max(spread.p90 for _, spread in rows) * 1.22)
    return figure


Law = Callable[[float], float]


def scaling(
    title: str,
    hardware: str,
    x_label: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
    law: tuple[str, Law] | None = None,
) -> Figure:
    """Seconds per step over something that grows, both axes logarithmic. Points are (x, seconds, label)."""
    figure, axes = canvas(title, hardware)
    colours = (LEAST, EXCESS)
    for (name, points), colour in zip(series, colours, strict=False):
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        axes.plot(xs, ys, "o", color=colour, label=name, markersize=6)
    for k, (x, y, labels) in enumerate(_together([point for _, points in series for point in points])):
        above = k % 2 == 0  # on both sides of a rising line
        axes.annotate(
            "\n".join(labels),
            (x, y),
            (-7, 5) if above else (7, -5),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            fontsize=7.5,
            color=INK,
        )
    if law is not None:
        xs = sorted(x for _, points in series for x, _, _ in points)
        ys = [law[1](x) for x in xs]
        axes.plot(xs, ys, "--", color=INK, linewidth=1, label=law[0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.margins(0.12, 0.16)
    axes.set_xlabel(x_label)
    axes.set_ylabel("seconds per step, median")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    return figure


NEAR = 1.08  # points nearer than this in x share a label


def _together(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, list[str]]]:
    """Points in the order of x, with those that lie on top of each other as one."""
    found: list[tuple[float, float, list[str]]] = []
    for x, y, label in sorted(points):
        if found and x <= found[-1][0] * NEAR:
            found[-1][2].append(label)
        else:
            found.append((x, y, [label]))
    return found


def draw_sweep(sweep: Sweep, folder: Path) -> list[Path]:
    """The scaling over work, with its law, and one plot of bars for each other axis."""
    grown = [p for p in sweep.points if p.axis in ("size", "window") and p.seconds is not None]
    found = []
    if grown:
        largest = max(p.flops for p in grown)
        factor, unit = (1e15, "PFLOP") if largest >= 1e14 else (1e9, "GFLOP")
        series = []
        for axis in ("window", "size"):
            placed = [
                (p.flops / factor, p.seconds.median, p.label) for p in grown if p.axis == axis and p.seconds
            ]
            series.append((f"over the {axis}", placed))
        shares = {p.flops: p.attention_share for p in grown}
        rates, law = sweep.rates, sweep.law
        dashed = (f"law: {law.text}", lambda x: law.seconds(x * factor)) if law else None
        if rates:
            ordered = sorted(shares)
            dashed = (
                f"law: {rates.text}",
                lambda x: rates.seconds(
                    x * factor, float(np.interp(x * factor, ordered, [shares[f] for f in ordered]))
                ),
            )
        models = ", ".join(dict.fromkeys(p.shape.model for p in grown))
        figure = scaling(
            "Seconds per step over the work of a step",
            f"{models}, {sweep.card.hardware}",
            f"{unit} per step",
            [row for row in series if row[1]],
            dashed,
        )
        found += save(figure, folder / "scaling")
    for axis, what in (("steps", "a whole job"), ("precision", "a step"), ("vram", "a step")):
        points = [p for p in sweep.points if p.axis == axis and p.seconds is not None]
        if points:
            found += save(bars(f"Seconds of {what}", sweep.card.hardware, points), folder / f"sweep-{axis}")
    return found


def bars(title: str, hardware: str, points: Sequence[Point]) -> Figure:
    """One bar per point of an axis, with its memory where that is known."""
    figure, axes = canvas(title, f"{points[0].shape.title}, {hardware}", height=1.6 + 0.55 * len(points))
    for y, point in enumerate(points):
        assert point.seconds is not None
        seconds, memory = point.seconds.median, point.peak_memory_bytes
        axes.barh(y, seconds, 0.65, color=LEAST)
        text = f"{seconds:.3g} s" + (f", {memory / 1e9:.1f} GB" if memory else "")
        axes.annotate(text, (seconds, y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(points)), [point.label for point in points])
    axes.invert_yaxis()
    axes.set_xlabel("seconds, median")
    axes.set_xlim(0, max(p.seconds.median for p in points if p.seconds) * 1.25)
    return figure


def draw_quality(quality: Quality, folder: Path) -> list[Path]:
    """Relative error of the velocity over the steps, ours and the noise floor."""
    figure, axes = canvas(
        f"Velocity against {quality.reference}, on equal latents",
        f"{quality.shape.title}, {quality.card.hardware}; weights {quality.weights}",
        height=4,
    )
    for row, colour in zip(quality.rows, (LEAST, OTHER), strict=False):
        steps = range(1, len(row.velocity_errors) + 1)
        same = "" if any(row.velocity_errors) else ": no difference"
        axes.plot(steps, row.velocity_errors, "o-", color=colour, label=row.name + same)
    errors = [error for row in quality.rows for error in row.velocity_errors if error]
    if errors:
        axes.set_yscale("log")
        axes.set_ylim(10 ** math.floor(math.log10(min(errors))), 10 ** math.ceil(math.log10(max(errors))))
    axes.set_xticks(range(1, max(len(row.velocity_errors) for row in quality.rows) + 1))
    axes.set_xlabel("denoising step")
    axes.set_ylabel("relative error")
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    return save(figure, folder / "quality")
