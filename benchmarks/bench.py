"""One benchmark from its card to its result. Every measurement runs in its own process; this one makes no
CUDA context and imports no torch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from trt_wan import __version__
from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.machine.ceilings import Ceiling, measure_host
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import (
    NO_BYTECODE,
    forget_kernels,
    measure_job,
    with_graphs,
    workplace,
)
from trt_wan.benchmarks.peers.contest import Contest, take_turns
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.result import Result
from trt_wan.benchmarks.report.times import JobTimes, StepTimes, WorkRow
from trt_wan.benchmarks.work.bound import (
    attention_rate,
    datasheet_rates,
    measured_rates,
    network_times,
    step_bound,
)
from trt_wan.benchmarks.work.cost import Calls, Work, calls, step_flops, works
from trt_wan.runtime.events import Note, Progress, silent


@dataclass(frozen=True)
class Options:
    shape: Shape
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of runtime.settings.Settings
    weights: str | None = None  # None: random
    contest: Contest = Contest()
    job_steps: int = 4  # in a whole job
    jobs: int = 3  # whole jobs from a warm start: a single one says little about a start
    cold: bool = True  # whether a start without finished kernels is measured too


def run_bench(options: Options, progress: Progress = silent) -> Result:
    card, shape, contest = read_card(), options.shape, options.contest
    not_measured: list[str] = []
    if os.environ.get(NO_BYTECODE):
        not_measured.append(
            f"starts without bytecode: {NO_BYTECODE} is set here, but not in measured processes"
        )
    with workplace(shape) as (env, clips):
        progress(Note(f"{card.hardware}; {shape.title}, {shape.plan.tokens} tokens"))
        progress(Note("measuring the ceilings of this machine"))
        ceilings = measure_ceilings(shape, card, env, not_measured)
        spec = Spec(shape, clips, options.job_steps, dict(options.settings), options.weights)
        cold = _cold(options.cold, card, spec, env, progress, not_measured)
        if cold is None and card.gpu is not None:
            progress(Note("a whole job that is not counted: it finishes the kernels"))
            with_graphs(lambda: measure_job(spec, env), progress)
        warm_jobs = []
        for n in range(options.jobs):
            progress(Note(f"a whole job, warm, {n + 1} of {options.jobs}"))
            times, opened = with_graphs(lambda: measure_job(spec, env), progress)
            begun = f"its first step is done {times.first_step_seconds:.3f} s after the start"
            progress(Note(f"  {times.seconds:.3f} s; {begun}"))
            warm_jobs.append(times)
        progress(Note(f"{contest.rounds} rounds of {contest.steps} steps"))
        rounds, host_rounds, profile, peers = take_turns(contest, spec, env, progress)
    plan = replace(shape.plan, precision=opened["precision"])
    work, counts = works(shape.config, plan), calls(shape.config, plan, options.job_steps)
    rates = measured_rates(ceilings, attention_rate(work, profile["networks"]))
    fp8_attention = options.settings.get("tier") in ("fast", "turbo")
    sheet = datasheet_rates(card.datasheet, fp8_attention) if card.datasheet else None
    steps = StepTimes(
        seconds=Spread.of(sum(rounds, [])),
        host_seconds=Spread.of(sum(host_rounds, [])),
        rounds=rounds,
        networks=network_times(work, profile["networks"], rates),
        profiled_seconds=profile["seconds"],
        uploads=profile["uploads"],
        bound_seconds=step_bound(work, counts, rates) if rates else None,
        bound_about=rates.about if rates else "no ceilings were measured",
        datasheet_seconds=step_bound(work, counts, sheet) if sheet else None,
    )
    return Result(
        shape=shape,
        tokens=plan.tokens,
        step_flops=step_flops(shape.config, plan),
        weights=options.weights or "random: figures are of speed, never of picture quality",
        precision=plan.precision,
        settings=options.settings,
        choices=opened["choices"],
        card=card,
        ceilings=ceilings,
        work=[work_row(name, work, counts) for name in work],
        cold=cold,
        warm_jobs=warm_jobs,
        steps=steps,
        peers=peers,
        not_measured=not_measured,
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def work_row(name: str, work: Mapping[str, Work], counts: Mapping[str, Calls]) -> WorkRow:
    w, n = work[name], counts[name]
    flops = (w.linear, w.attention, w.convolution)
    return WorkRow(name, n.step, n.window, n.job, *flops, w.bytes, w.fp8)


def measure_ceilings(
    shape: Shape, card: Card, env: Mapping[str, str], not_measured: list[str]
) -> list[Ceiling]:
    """Measured in a process of its own; `not_measured` gets the failures."""
    if card.gpu is None:
        return measure_host()
    command = [sys.executable, "-m", "trt_wan.benchmarks.machine.ceilings", *shape.arguments()]
    answer = subprocess.run(command, capture_output=True, text=True, env=env)
    if answer.returncode:
        last = [line for line in answer.stderr.splitlines() if line.strip()][-1:]
        not_measured.append(f"ceilings: {' '.join(last)}")
        return []
    found = [Ceiling(**row) for row in json.loads(answer.stdout.splitlines()[-1])]
    not_measured += [f"{c.name}: {c.reason}" for c in found if c.rate is None]
    return found


def _cold(
    asked: bool,
    card: Card,
    spec: Spec,
    env: Mapping[str, str],
    progress: Progress,
    not_measured: list[str],
) -> JobTimes | None:
    """A job without finished kernels, but with graphs and engines: building them is no part of a start."""
    if not asked or card.gpu is None:
        why = "ONNX Runtime keeps nothing between starts" if card.gpu is None else "not asked for"
        not_measured.append(f"cold start: {why}")
        return None
    while True:
        forget_kernels(env)
        progress(Note("a whole job, cold: TensorRT-RTX finishes its kernels"))
        times, opened = with_graphs(lambda: measure_job(spec, env), progress)
        if not any(choice.startswith("built ") for choice in opened["choices"]):
            return times
        progress(Note("engines were built on the way: once more without that"))
