"""Measures the candidates for each network's place on this machine's GPU: time, and error against fp32.

Every candidate runs at the real shape on the same realistic inputs. A figure is written as soon as it is
known (engines/store/measurements.py), so a build that was stopped goes on with the next candidate. A
candidate that cannot be opened or run has a figure too.

The VAE's time is measured at the real shape, its error at a small one: 4 frames of 832x480 are 13.5 TFLOP,
minutes of a CPU in fp32.
"""

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trt_wan.build.compile import export_graphs
from trt_wan.build.on_gpu import download, drawn, placed, run_segment, started
from trt_wan.build.realistic import Float, Host, realistic
from trt_wan.build.reference import (
    SMALL_PICTURE,
    Tokens,
    picture_error,
    picture_reference,
    reference,
    relative_error,
    sample_of,
)
from trt_wan.engines.choice.candidates import (
    SEGMENTS,
    VAE,
    Candidate,
    Engine,
    Machine,
    Tier,
    candidates,
    has_engine,
    tiers,
)
from trt_wan.engines.choice.choose import Missing, accurate, place_of
from trt_wan.engines.choice.recipes import recipes_here
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.measurements import Figure, read_figures, record_figures, title
from trt_wan.errors import GpuFault, TrtWanError
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import CandidateReady, CandidateStep, Progress
from trt_wan.runtime.opening.segments import open_segments
from trt_wan.runtime.segments.segment import Segment

SEED = 0
WARM_UPS = 2
TIMED = 10

Clock = Callable[[Any, Callable[[], None]], float]  # stream, work to time -> milliseconds
Open = Callable[[Candidate, Plan], Segment]


def event_clock(stream: Any, work: Callable[[], None]) -> float:
    """The median of TIMED runs, between events that are enqueued around each: the host runs ahead."""
    from cuda.core import EventOptions

    for _ in range(WARM_UPS):
        work()
    options = EventOptions(timing_enabled=True)
    events = []
    for _ in range(TIMED):
        start = stream.record(options=options)
        work()
        events.append((start, stream.record(options=options)))
    stream.sync()
    return statistics.median(float(stop - start) for start, stop in events)


def autotune(
    model: ModelConfig,
    plan: Plan,
    machine: Machine,
    gpu: Gpu,
    missing: Missing,
    progress: Progress,
    *,
    again: bool = False,
    clock: Clock = event_clock,
    opened: Open | None = None,
) -> list[Figure]:
    """The figures of every place with several candidates: the known ones, or with `again` all new ones.

    A missing candidate has a figure too. `opened` opens a candidate in tests. Raises UsageError without
    torch, which exports the reference, and GpuFault if a candidate breaks the GPU's context: then nothing
    else can be measured in this process.
    """
    recipes = recipes_here(model, plan, machine)

    def opened_here(row: Candidate, at: Plan) -> Segment:
        if at == plan:
            made = recipes
        else:
            export_graphs(model, at, progress)
            made = recipes_here(model, at, machine)
        return open_segments({row.network: row}, model, at, gpu, made, progress)[row.network]

    figures: list[Figure] = []
    for network in (name for name in SEGMENTS if name in networks(model, plan)):
        rows = candidates(network, plan.precision, machine)
        absent = {row.name: sentence for row in rows if (sentence := missing(row)) is not None}
        usable = [row for row in rows if row.name not in absent]
        if len(usable) < 1 + has_engine(network):  # a lone engine has no rival
            continue
        sources = [recipes[row.engine].engine.source for row in rows if row.engine is not None]
        place = place_of(recipes[Engine(network)].engine.source, machine)
        found = {} if again else read_figures(place)
        wanted = [row for row in usable if row.name not in found or found[row.name].state == "missing"]
        if wanted:
            blanks = {row.name: _blank(row, plan.precision, machine) for row in rows}
            found |= {name: _without(blanks[name], "missing", why) for name, why in absent.items()}
            of = _PictureBench.of if network in VAE else _Bench.of
            bench = of(network, model, plan, gpu, clock, opened or opened_here)
            for figure in bench.figures([(row, blanks[row.name]) for row in wanted], progress):
                found[figure.candidate] = figure
                record_figures(place, sources, found)
            found |= _with_choice(found, rows, plan.precision)
            record_figures(place, sources, found)
        figures += [found[row.name] for row in rows if row.name in found]
    return figures


@dataclass(frozen=True)
class _Bench:
    """One network with its inputs, and its fp32 outputs at some tokens."""

    gpu: Gpu
    plan: Plan
    network: Network
    values: dict[str, Host]
    tokens: Tokens
    wanted: dict[str, Float]
    clock: Clock
    opened: Open

    @classmethod
    def of(cls, name: str, model: ModelConfig, plan: Plan, gpu: Gpu, clock: Clock, opened: Open) -> "_Bench":
        network = networks(model, plan)[name]
        tokens = sample_of(name, plan, SEED)
        values = realistic(network, SEED)
        wanted = reference(name, model, values, tokens, plan)
        return cls(gpu, plan, network, values, tokens, wanted, clock, opened)

    def figures(self, rows: Sequence[tuple[Candidate, Figure]], progress: Progress) -> Iterator[Figure]:
        """Measures the candidates one after another, each with its blank figure."""
        network = self.network.name
        with self._inputs() as inputs:
            for number, (row, blank) in enumerate(rows, 1):
                progress(CandidateStep(network, row.name, number, len(rows)))
                figure = self._figure(row, blank, inputs)
                gc.collect()  # frees the candidate's memory on the GPU
                yield figure
                f, count = figure, (number, len(rows))
                progress(
                    CandidateReady(network, row.name, *count, f.state, f.ms, f.error, f.tolerance, title(f))
                )
                if f.state == "failed":
                    self._require_context(f, len(rows) - number)

    def _figure(self, row: Candidate, blank: Figure, inputs: Mapping[str, int]) -> Figure:
        try:
            ms, error = self.measure(row, inputs)
        except Exception as problem:  # libraries raise errors of any type; the other candidates still count
            return _without(blank, "failed", _sentence(problem))
        if math.isinf(error):
            return _without(blank, "broken", "Its output has numbers that are not finite.")
        return replace(blank, ms=ms, error=error)

    def _require_context(self, failed: Figure, left: int) -> None:
        """Raises GpuFault if the failed candidate broke the context: every later call would fail too."""
        try:
            self.gpu.sync()
        except Exception as problem:  # any type of error: the context is lost
            raise GpuFault(
                f"Measuring {failed.network} = {failed.candidate} broke the GPU's context "
                f"({failed.problem}); {left} of its rivals are not measured.",
                "Run the same command again: it goes on with the others.",
            ) from problem

    def measure(self, candidate: Candidate, inputs: Mapping[str, int]) -> tuple[float, float]:
        """Milliseconds and relative error."""
        gpu, segment = self.gpu, self.opened(candidate, self.plan)
        with started(gpu, segment, self.network, inputs) as addresses:
            segment.enqueue(addresses)
            error = self._error(candidate, addresses)
            ms = self.clock(gpu.stream, lambda: segment.enqueue(addresses))
            segment.settle()
        return ms, error

    def _inputs(self) -> AbstractContextManager[dict[str, int]]:
        return placed(self.gpu, self.values)

    def _error(self, candidate: Candidate, addresses: Mapping[str, int]) -> float:
        made = download(self.gpu, self.network.outputs, addresses)
        return relative_error(made, self.wanted, self.values, self.tokens)


@dataclass(frozen=True)
class _PictureBench(_Bench):
    """A network of the VAE. Its values and fp32 outputs are those of `small`."""

    small: Network
    small_plan: Plan

    @classmethod
    def of(
        cls, name: str, model: ModelConfig, plan: Plan, gpu: Gpu, clock: Clock, opened: Open
    ) -> "_PictureBench":
        small_plan = replace(SMALL_PICTURE, precision=plan.precision)
        small = networks(model, small_plan)[name]
        values = realistic(small, SEED)
        wanted = picture_reference(name, model, small_plan, values)
        network, none = networks(model, plan)[name], np.zeros(0, np.int64)
        return cls(gpu, plan, network, values, none, wanted, clock, opened, small, small_plan)

    def _inputs(self) -> AbstractContextManager[dict[str, int]]:
        return drawn(self.gpu, self.network)

    def _error(self, candidate: Candidate, addresses: Mapping[str, int]) -> float:
        """The error of the small picture. The large one must be finite; its caches are not looked at."""
        gpu, result = self.gpu, self.network.outputs[:1]
        (whole,) = download(gpu, result, addresses).values()
        made = run_segment(gpu, self.opened(candidate, self.small_plan), self.small, self.values)
        return picture_error(made, self.wanted) if np.isfinite(whole).all() else math.inf


def _blank(candidate: Candidate, precision: Precision, machine: Machine) -> Figure:
    """A figure without time and error."""
    return Figure(
        candidate.network,
        candidate.name,
        "measured",
        ms=None,
        error=None,
        tolerance=tolerance(candidate.network, precision, candidate.tier),
        tier=candidate.tier,
        gpu=machine.gpu.name,
        version=machine.version,
    )


def _without(blank: Figure, state: Any, problem: str) -> Figure:
    return replace(blank, state=state, problem=problem)


def _with_choice(
    figures: Mapping[str, Figure], rows: Sequence[Candidate], precision: Precision
) -> dict[str, Figure]:
    """The figures, each with the tiers that take it."""
    rivals = [figures[row.name] for row in rows if row.name in figures and not row.on_request]
    # turbo has one network that fast has not, and takes all others from fast
    own: list[Tier] = [tier for tier in tiers(precision) if tier != "turbo" or rows[0].tier == "turbo"]
    best = {tier: ranked[0] for tier in own if (ranked := accurate(rivals, precision, tier))}
    return {
        name: replace(figure, chosen=", ".join(tier for tier, first in best.items() if first is figure))
        for name, figure in figures.items()
    }


def _sentence(problem: Exception) -> str:
    if isinstance(problem, TrtWanError):
        return problem.message
    first = str(problem).splitlines()[:1]
    return ": ".join([type(problem).__name__, *first])
