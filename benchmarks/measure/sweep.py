"""The growth of cost with work: the same measurement at many sizes, windows, steps, precisions and memory
limits.

Every point is measured in a new process. A point that fails (too little memory, a shape that does not build)
keeps its reason.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np

from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import is_lost
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import measure_job, measure_steps, with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.benchmarks.work.cost import calls, step_flops, works
from trt_wan.benchmarks.work.cost_law import RateLaw, fit_rates
from trt_wan.errors import TrtWanError, UsageError
from trt_wan.runtime.events import Note, Progress, silent

RANDOM = "random"
Times = tuple[Sequence[float], Mapping[str, float], int | None]  # seconds, seconds by network, peak bytes
Measure = Callable[["Ask", int, str | None, Progress], Times]
SWEEP_SCHEMA = "trt-wan-bench-sweep/1"
Axis = Literal["size", "window", "steps", "precision", "vram"]
GROWING: tuple[Axis, ...] = ("window", "size")
AXES: tuple[Axis, ...] = ("size", "window", "steps", "precision", "vram")
SIZES = ("832x480", "480x832", "640x640", "1280x720", "720x1280")
WINDOWS = (5, 17, 33, 49, 77, 101, 129, 161)
STEPS = (4, 10, 20)
PRECISIONS = (("bf16", "exact"), ("fp8", "exact"), ("fp8", "fast"))
VRAM = (12.0, 16.0, 24.0)
RATES = 3  # terms of the cost law: it needs more points than that


@dataclass(frozen=True)
class Ask:
    """A point to measure. Its label tells it from the other points of its axis."""

    axis: Axis
    label: str
    shape: Shape
    settings: Mapping[str, Any]
    job_steps: int | None = None  # if given, a whole job of so many steps is timed instead of steps


@dataclass(frozen=True)
class Point:
    axis: Axis
    label: str
    shape: Shape
    settings: Mapping[str, Any]
    tokens: int
    flops: int  # per step, or per job for a whole job
    attention_share: float  # as a part of the FLOPs
    seconds: Spread | None  # per step, or per job
    peak_memory_bytes: int | None = None
    networks: Mapping[str, float] = field(default_factory=dict)  # seconds in a step
    reason: str = ""  # the failure of a point without seconds
    lost: bool = False  # whether its rank or its process was lost


@dataclass(frozen=True)
class Sweep:
    card: Card
    points: list[Point]
    rates: RateLaw | None  # over sizes and windows
    errors: list[float]  # the law's relative errors at those points
    weights: str = RANDOM
    finished: bool = True  # False: more points are to come
    schema: str = SWEEP_SCHEMA
    stem: ClassVar[str] = "sweep"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def lost(self) -> list[str]:
        return [f"{p.axis} {p.label}: {p.reason}" for p in self.points if p.lost]

    @property
    def grown(self) -> list[Point]:
        """The measured points over sizes and windows."""
        return [p for p in self.points if p.axis in GROWING and p.seconds is not None]

    def sheets(self) -> list[Sheet | str]:
        heads = (
            "axis",
            "tokens",
            "PFLOP",
            "attention",
            "seconds",
            "p10",
            "p90",
            "TFLOP/s",
            "times the law",
            "memory",
        )
        found: list[Sheet | str] = [
            Sheet(
                "sweep",
                f"Sweep, {self.card.hardware}; weights {self.weights}",
                heads,
                [self._row(p) for p in self.points],
            )
        ]
        if self.rates is not None:
            worst = max(abs(error) for error in self.errors)
            found.append(f"Cost law over sizes and windows: {self.rates.text}; off by {worst:.1%} at most")
        if (pair := crossing(self.points)) is not None:
            found.append(f"Attention takes most of a step from {pair[1].label} on ({pair[1].tokens} tokens).")
        return [*found, *(f"Not measured: {p.axis} {p.label}: {p.reason}" for p in self.points if p.reason)]

    def _row(self, p: Point) -> Row:
        work = (Figure(p.tokens, "count"), Figure(p.flops, "PFLOP"), Figure(p.attention_share, "%"))
        if p.seconds is None:
            return p.label, p.axis, *work, "-", "", "", "", "", ""
        s, law = p.seconds, self.rates if p.axis in GROWING else None
        times = Figure(s.median / law.seconds(p.flops, p.attention_share), "times") if law else ""
        spread = (Figure(s.median, "s"), Figure(s.p10, "s"), Figure(s.p90, "s"))
        rate = Figure(p.flops / s.median, "TFLOP/s")
        return p.label, p.axis, *work, *spread, rate, times, Figure(p.peak_memory_bytes, "GB")

    def draw(self) -> Mapping[str, Any]:
        """The scaling over work, with its law, and one plot of bars for each other axis."""
        from trt_wan.benchmarks.report import plots

        drawn: dict[str, Any] = {}
        if grown := self.grown:
            factor, unit = (1e15, "PFLOP") if max(p.flops for p in grown) >= 1e14 else (1e9, "GFLOP")
            series = {
                f"over the {axis}": [
                    (p.flops / factor, p.seconds.median, p.label)
                    for p in grown
                    if p.axis == axis and p.seconds
                ]
                for axis in GROWING
            }
            shares, law = {p.flops: p.attention_share for p in grown}, self.rates
            ordered = sorted(shares)

            def dashed(x: float) -> float:
                assert law is not None
                share = float(np.interp(x * factor, ordered, [shares[f] for f in ordered]))
                return law.seconds(x * factor, share)

            models = ", ".join(dict.fromkeys(p.shape.model for p in grown))
            drawn["scaling"] = plots.scaling(
                "Seconds per step over the work of a step",
                f"{models}, {self.card.hardware}",
                f"{unit} per step",
                {name: points for name, points in series.items() if points},
                (f"law: {law.text}", dashed) if law else None,
            )
        for axis, subject in (("steps", "a whole job"), ("precision", "a step"), ("vram", "a step")):
            points = [p for p in self.points if p.axis == axis and p.seconds is not None]
            groups = {}
            for p in points:
                assert p.seconds is not None
                memory = f", {p.peak_memory_bytes / 1e9:.1f} GB" if p.peak_memory_bytes else ""
                text = f"{p.seconds.median:.3g} s{memory}"
                groups[p.label] = [plots.Bar([("", p.seconds.median, plots.LEAST)], text)]
            if points:
                under = f"{points[0].shape.title}, {self.card.hardware}"
                drawn[f"sweep-{axis}"] = plots.bars(f"Seconds of {subject}", under, groups, "seconds, median")
        return drawn


def asks(
    base: Shape,
    settings: Mapping[str, Any],
    axes: Sequence[Axis],
    sizes: Sequence[str] = SIZES,
    windows: Sequence[int] = WINDOWS,
    steps: Sequence[int] = STEPS,
) -> list[Ask]:
    """Returns the points of `axes`, each axis around `base`. Raises UsageError for an impossible shape."""
    found = []
    for axis in axes:
        match axis:
            case "size":
                for size in sizes:
                    width, height = (int(side) for side in size.split("x"))
                    found.append(Ask(axis, size, Shape(base.model, width, height, base.window), settings))
            case "window":
                for window in windows:
                    shape = Shape(base.model, base.width, base.height, window)
                    found.append(Ask(axis, f"{window} frames", shape, settings))
            case "steps":
                found += [Ask(axis, f"{n} steps", base, settings, job_steps=n) for n in steps]
            case "precision":
                for precision, tier in PRECISIONS:
                    chosen = {**settings, "precision": precision, "tier": tier}
                    found.append(Ask(axis, f"{precision} {tier}", base, chosen))
            case "vram":
                for limit in VRAM:
                    found.append(Ask(axis, f"{limit:g} GB", base, {**settings, "vram": limit}))
    assert all(ask.shape.plan for ask in found)  # a wrong shape is refused before anything is measured
    return found


def run_sweep(
    points: Sequence[Ask],
    steps: int,
    weights: str | None = None,
    progress: Progress = silent,
    measure: Measure | None = None,
    keep: Callable[[Sweep], object] = lambda unfinished: None,
    budget: Budget | None = None,
) -> Sweep:
    """Times `steps` at each point. Points that ask for the same are measured once. `keep` gets the points so
    far after every one, from the first measured one on. Points that do not fit into the budget keep that as
    their reason. Raises TrtWanError if no point was measured.
    """
    budget = budget or Budget()
    measure = measure or partial(_measured, budget=budget)
    known: dict[str, Point] = {}
    found: list[Point] = []
    failures: list[TrtWanError] = []
    shortest = math.inf  # seconds that a point took, with the start of its process
    for ask in points:
        key = json.dumps([asdict(ask.shape), dict(ask.settings), ask.job_steps], sort_keys=True)
        if key not in known:
            began = budget.now()
            needed = 0.0 if shortest == math.inf else shortest
            known[key] = _point(ask, steps, weights, progress, measure, budget, needed, failures)
            if known[key].seconds is not None:
                shortest = min(shortest, budget.now() - began)
        found.append(replace(known[key], axis=ask.axis, label=ask.label))
        if shortest < math.inf:
            keep(_sweep(found, weights, finished=False))
    if shortest == math.inf:
        nothing = UsageError(f"Nothing was measured: {found[0].reason}.", "Use a larger --budget.")
        raise next(iter(failures), nothing)
    return _sweep(found, weights, finished=True)


def _sweep(found: Sequence[Point], weights: str | None, finished: bool) -> Sweep:
    """The points with the law of those over sizes and windows, if they are enough."""
    grown = sorted(
        {(p.flops, p.attention_share, p.seconds.median) for p in found if p.seconds and p.axis in GROWING}
    )
    amounts = len({flops for flops, _, _ in grown})
    rates = fit_rates(grown) if amounts > RATES else None
    errors = [seconds / rates.seconds(flops, share) - 1 for flops, share, seconds in grown] if rates else []
    return Sweep(read_card(), list(found), rates, errors, weights or RANDOM, finished)


def _point(
    ask: Ask,
    steps: int,
    weights: str | None,
    progress: Progress,
    measure: Measure,
    budget: Budget,
    needed: float,
    failures: list[TrtWanError],
) -> Point:
    """`needed` are the seconds that a point takes at least. `failures` gets the error of a point that the
    budget did not end.
    """
    config, plan = ask.shape.config, ask.shape.plan
    table, counts = works(config, plan), calls(config, plan, 1)
    flops = step_flops(config, plan)
    share = sum(w.attention * counts[name].step for name, w in table.items()) / flops
    about = (ask.axis, ask.label, ask.shape, ask.settings, plan.tokens, flops * (ask.job_steps or 1), share)

    def left_out(reason: str, lost: bool = False) -> Point:
        progress(Note(f"{ask.axis} {ask.label}: not measured: {reason}"))
        return Point(*about, None, reason=reason, lost=lost)

    if short := budget.too_short(needed, "a point"):
        return left_out(budget.over or short)
    try:
        seconds, networks, peak = measure(ask, steps, weights, progress)
    except TrtWanError as error:
        lost = is_lost(error, budget)
        if lost or not budget.over:
            failures.append(error)
            return left_out(error.message, lost)
        return left_out(budget.over)
    point = Point(*about, Spread.of(seconds), peak, networks)
    progress(Note(f"{ask.axis} {ask.label}: {Spread.of(seconds).median:.4g} s"))
    return point


def _measured(ask: Ask, steps: int, weights: str | None, progress: Progress, budget: Budget) -> Times:
    with workplace(ask.shape) as (env, clips):
        spec = Spec(ask.shape, clips, ask.job_steps or 1, dict(ask.settings), weights)
        if ask.job_steps:
            job, _ = with_graphs(lambda: measure_job(spec, env, budget), progress)
            return [job.seconds], {}, job.usage.peak_memory_bytes
        return with_graphs(lambda: measure_steps(spec, steps, env, budget), progress)


def crossing(points: Sequence[Point]) -> tuple[Point, Point] | None:
    """Returns the neighbours between which attention begins to take more than half of a step."""
    timed = [p for p in points if p.networks and p.axis in GROWING]
    ordered = sorted(timed, key=lambda p: p.flops)

    def mostly_attention(point: Point) -> bool:
        return point.networks.get("attention", 0.0) > sum(point.networks.values()) / 2

    for before, after in pairwise(ordered):
        if not mostly_attention(before) and mostly_attention(after):
            return before, after
    return None
