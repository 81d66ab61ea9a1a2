"""How the cost grows as the work grows: the same measurement at many sizes, windows, steps, precisions and
memory limits.

Every point is a process of its own. One that fails (too little memory, a shape that does not build) is a
point with a reason.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from trt_wan.benchmarks.bench import (
    OURS_MODULE,
    Rounds,
    measure_job,
    with_graphs,
    workplace,
)
from trt_wan.benchmarks.measure.card import Card, read_card
from trt_wan.benchmarks.measure.cost import calls, step_flops, works
from trt_wan.benchmarks.measure.cost_law import Bend, PowerLaw, RateLaw, bends, fit, fit_rates
from trt_wan.benchmarks.measure.measured_process import Spec, most_steps
from trt_wan.benchmarks.measure.monitor import Monitor
from trt_wan.benchmarks.measure.processes import Child
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import Note, Progress, silent

SWEEP_SCHEMA = "trt-wan-bench-sweep/1"
Axis = Literal["size", "window", "steps", "precision", "vram"]
AXES: tuple[Axis, ...] = ("size", "window", "steps", "precision", "vram")
SIZES = ("832x480", "480x832", "640x640", "1280x720", "720x1280")
WINDOWS = (5, 17, 33, 49, 77, 101, 129, 161)
STEPS = (4, 10, 20)
PRECISIONS = (("bf16", "exact"), ("fp8", "exact"), ("fp8", "fast"))
VRAM = (12.0, 16.0, 24.0)
RATES = 3  # terms of the cost law: it needs more points than that


@dataclass(frozen=True)
class Ask:
    """A point to measure: what differs from the others of its axis is its label."""

    axis: Axis
    label: str
    shape: Shape
    settings: Mapping[str, Any]
    job_steps: int | None = None  # a whole job of so many steps instead of single steps


@dataclass(frozen=True)
class Point:
    axis: Axis
    label: str
    shape: Shape
    settings: Mapping[str, Any]
    tokens: int
    flops: int  # of a step; of all steps where a whole job was measured
    attention_share: float  # of the FLOPs
    seconds: Spread | None  # of a step, or of a whole job
    peak_memory_bytes: int | None = None
    networks: Mapping[str, float] = field(default_factory=dict)  # seconds in a step
    reason: str = ""  # why it was not measured


@dataclass(frozen=True)
class Sweep:
    card: Card
    points: list[Point]
    rates: RateLaw | None  # over sizes and windows
    errors: list[float]  # of it at each of those points, relative
    law: PowerLaw | None  # the same points as one power
    bends: list[Bend]
    schema: str = SWEEP_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


def asks(
    base: Shape,
    settings: Mapping[str, Any],
    axes: Sequence[Axis],
    sizes: Sequence[str] = SIZES,
    windows: Sequence[int] = WINDOWS,
    steps: Sequence[int] = STEPS,
) -> list[Ask]:
    """The points of `axes`, each axis around `base`. UsageError if one has a shape that is not possible."""
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
    assert all(ask.shape.plan for ask in found)  # made here, so that a wrong one is refused at once
    return found


def run_sweep(
    points: Sequence[Ask], steps: int, weights: str | None = None, progress: Progress = silent
) -> Sweep:
    """`steps` are timed at each point. Points that ask for the same are measured once."""
    known: dict[str, Point] = {}
    found = []
    for ask in points:
        key = json.dumps([asdict(ask.shape), dict(ask.settings), ask.job_steps], sort_keys=True)
        if key not in known:
            known[key] = _point(ask, steps, weights, progress)
        same = known[key]
        found.append(Point(**{**_fields(same), "axis": ask.axis, "label": ask.label}))
    grown = sorted(
        {
            (p.flops, p.attention_share, p.seconds.median)
            for p in found
            if p.seconds and p.axis in ("size", "window")
        }
    )
    measured = [(flops, seconds) for flops, _, seconds in grown]
    amounts = len({flops for flops, _ in measured})
    rates = fit_rates(grown) if amounts > RATES else None
    errors = [seconds / rates.seconds(flops, share) - 1 for flops, share, seconds in grown] if rates else []
    law = fit(measured) if amounts > 1 else None
    return Sweep(read_card(), found, rates, errors, law, bends(measured))


def _fields(point: Point) -> dict[str, Any]:
    return {name: getattr(point, name) for name in point.__dataclass_fields__}


def _point(ask: Ask, steps: int, weights: str | None, progress: Progress) -> Point:
    config, plan = ask.shape.config, ask.shape.plan
    table, counts = works(config, plan), calls(config, plan, 1)
    flops = step_flops(config, plan)
    share = sum(w.attention * counts[name].step for name, w in table.items()) / flops
    times = ask.job_steps or 1
    about = (ask.axis, ask.label, ask.shape, ask.settings, plan.tokens, flops * times, share)
    try:
        with workplace(ask.shape) as (env, clips):
            spec = Spec(ask.shape, clips, ask.job_steps or 1, dict(ask.settings), weights)
            if ask.job_steps:
                job, _ = with_graphs(lambda: measure_job(spec, env), progress)
                point = Point(*about, Spread.of([job.seconds]), job.usage.peak_memory_bytes)
            else:
                rounds, networks, peak = with_graphs(lambda: _steps(spec, steps, env), progress)
                point = Point(*about, Spread.of(sum(rounds, [])), peak, networks)
    except TrtWanError as error:
        progress(Note(f"{ask.axis} {ask.label}: not measured: {error.message}"))
        return Point(*about, None, reason=error.message)
    assert point.seconds is not None
    progress(Note(f"{ask.axis} {ask.label}: {point.seconds.median:.4g} s"))
    return point


def _steps(spec: Spec, steps: int, env: Mapping[str, str]) -> tuple[Rounds, dict[str, float], int | None]:
    most = most_steps(1, steps)
    whole = Spec(spec.shape, spec.clips, most, spec.settings, spec.weights)
    with Monitor.open() as monitor, Child(OURS_MODULE, ["steps", whole.to_json()], env) as child:
        child.read()
        answer = child.ask(str(steps))
        profile = child.ask("")
    networks = {row["name"]: float(row["seconds"]) for row in profile["networks"]}
    return [answer["seconds"]], networks, monitor.usage().peak_memory_bytes


def crossing(points: Sequence[Point]) -> tuple[Point, Point] | None:
    """The neighbours over windows and sizes between which attention begins to take more than all the rest."""
    timed = [p for p in points if p.networks and p.axis in ("size", "window")]
    ordered = sorted(timed, key=lambda p: p.flops)

    def mostly_attention(point: Point) -> bool:
        return point.networks.get("attention", 0.0) > sum(point.networks.values()) / 2

    for before, after in pairwise(ordered):
        if not mostly_attention(before) and mostly_attention(after):
            return before, after
    return None


def write_sweep(sweep: Sweep, folder: Path) -> list[Path]:
    """sweep.json, sweep.csv, and plots where matplotlib is installed."""
    import csv

    folder.mkdir(parents=True, exist_ok=True)
    document, rows = folder / "sweep.json", folder / "sweep.csv"
    document.write_text(sweep.to_json() + "\n")
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("axis", "point", "tokens", "FLOP", "seconds", "p10", "p90", "peak bytes", "reason"))
        for p in sweep.points:
            figures = (p.seconds.median, p.seconds.p10, p.seconds.p90) if p.seconds else ("", "", "")
            writer.writerow(
                (p.axis, p.label, p.tokens, p.flops, *figures, p.peak_memory_bytes or "", p.reason)
            )
    try:
        from trt_wan.benchmarks.report.plots import draw_sweep
    except ModuleNotFoundError:
        return [document, rows]
    return [document, rows, *draw_sweep(sweep, folder)]
