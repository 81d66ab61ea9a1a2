"""Measures the candidates for a network's place on the GPU that is there: how fast, and how far from fp32.

Every candidate runs at the real shape on the same realistic inputs. The figures go into the manifests of the
engines among them, where a run finds them. How a candidate is opened is the caller's business; one that
cannot be opened or run is a figure as well.
"""

import gc
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.build.realistic import Float, Host, realistic
from trt_wan.build.reference import SAMPLE, Tokens, reference, relative_error
from trt_wan.engines.choice.candidates import SEGMENTS, Candidate, Machine, candidates, tiers
from trt_wan.engines.choice.choose import Missing, accurate, figures_of
from trt_wan.engines.choice.recipes import recipes_here
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import EngineId
from trt_wan.engines.store.engines import find, record_candidates
from trt_wan.engines.store.measurements import Figure
from trt_wan.errors import TrtWanError

SEED = 0
WARM_UPS = 2
TIMED = 10
ALIGNMENT = 256  # bytes; no buffer is smaller


class Segment(Protocol):
    """As in runtime/segments.py."""

    @property
    def scratch_bytes(self) -> int: ...

    def start(self, scratch: int) -> None: ...

    def enqueue(self, addresses: Mapping[str, int]) -> None: ...

    def settle(self) -> None: ...


class Gpu(Protocol):
    """As in runtime/device/gpu.py: buffers have a `handle` and `close(stream)`."""

    stream: Any

    def allocate(self, size: int) -> Any: ...

    def view(self, address: int, shape: Sequence[int], dtype: Any) -> Any: ...

    def write(self, array: Any, host: NDArray[Any]) -> None: ...

    def download(self, array: Any) -> NDArray[Any]: ...


Clock = Callable[[Any, Callable[[], None]], float]  # stream, what to time -> milliseconds
Open = Callable[[Candidate], Segment]


@dataclass(frozen=True)
class Measuring:
    network: str
    candidate: str
    number: int  # of this candidate, 1-based
    candidates: int


@dataclass(frozen=True)
class Measured:
    figure: Figure
    number: int
    candidates: int


TuneProgress = Callable[[Measuring | Measured], None]


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
    open_candidate: Open,
    missing: Missing,
    progress: TuneProgress,
    *,
    again: bool = False,
    clock: Clock = event_clock,
) -> list[Figure]:
    """The figures of every place that more than one candidate can take, measured now or, but for `again`,
    earlier on this GPU. A candidate that is missing is a figure too. UsageError if torch is not here, which
    exports the reference.
    """
    recipes = recipes_here(model, plan, machine)
    figures: list[Figure] = []
    for network in SEGMENTS:
        rows = candidates(network, plan.precision, machine)
        absent = {row.name: sentence for row in rows if (sentence := missing(row)) is not None}
        usable = [row for row in rows if row.name not in absent]
        if len(usable) < 2:
            continue
        engines = [recipes[row.engine].engine for row in rows if row.engine is not None]
        known = figures_of(engines, machine)
        if not again and all(row.name in known and known[row.name].state != "missing" for row in usable):
            figures += [known[row.name] for row in rows if row.name in known]
            continue
        blank = partial(_blank, plan.precision, machine)
        found = [blank(row, "missing", absent[row.name]) for row in rows if row.name in absent]
        contract = networks(model, plan)[network]
        found += _measure(contract, model, plan, usable, gpu, open_candidate, blank, progress, clock)
        free = {row.name for row in rows if not row.on_request}
        found = _with_choice(found, free, plan.precision)
        _record(engines, found)
        figures += found
    return figures


def _measure(
    network: Network,
    model: ModelConfig,
    plan: Plan,
    usable: Sequence[Candidate],
    gpu: Gpu,
    open_candidate: Open,
    blank: Callable[..., Figure],
    progress: TuneProgress,
    clock: Clock,
) -> list[Figure]:
    rng = np.random.default_rng(SEED)
    tokens = rng.choice(plan.tokens, SAMPLE, replace=plan.tokens < SAMPLE)
    values = realistic(network, SEED)
    bench = _Bench(gpu, network, values, tokens, reference(network.name, model, values, tokens), clock)
    found = []
    with _buffers(gpu, {name: host.nbytes for name, host in values.items()}) as inputs:
        for name, host in values.items():
            gpu.write(gpu.view(inputs[name], host.shape, host.dtype), host)
        for number, candidate in enumerate(usable, 1):
            progress(Measuring(network.name, candidate.name, number, len(usable)))
            try:
                ms, error = bench.measure(open_candidate, candidate, inputs)
            except (
                Exception
            ) as problem:  # a library raises what it likes; the others are measured all the same
                figure = blank(candidate, "failed", _sentence(problem))
            else:
                figure = replace(blank(candidate, "measured"), ms=ms, error=error)
                if math.isinf(error):
                    figure = blank(candidate, "broken", "Its output has numbers that are not finite.")
            gc.collect()  # what the candidate held on the GPU
            found.append(figure)
            progress(Measured(figure, number, len(usable)))
    return found


@dataclass(frozen=True)
class _Bench:
    """One network with inputs and what should come out of them at some tokens."""

    gpu: Gpu
    network: Network
    values: dict[str, Host]
    tokens: Tokens
    wanted: dict[str, Float]
    clock: Clock

    def measure(
        self, open_candidate: Open, candidate: Candidate, inputs: Mapping[str, int]
    ) -> tuple[float, float]:
        """Milliseconds and relative error."""
        gpu, shapes = self.gpu, {t.name: (t.shape, np.dtype(t.dtype)) for t in self.network.outputs}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
        segment = open_candidate(candidate)
        with _buffers(gpu, sizes) as outputs, _buffers(gpu, {"": segment.scratch_bytes}) as scratch:
            for (
                name,
                address,
            ) in outputs.items():  # all bits set is NaN in every type: what is not written shows
                gpu.write(gpu.view(address, (sizes[name],), np.uint8), np.full(sizes[name], 0xFF, np.uint8))
            segment.start(scratch[""])
            segment.enqueue({**inputs, **outputs})
            made = {
                name: gpu.download(gpu.view(outputs[name], shape, dtype))
                for name, (shape, dtype) in shapes.items()
            }
            error = relative_error(made, self.wanted, self.values, self.tokens)
            ms = self.clock(gpu.stream, lambda: segment.enqueue({**inputs, **outputs}))
            segment.settle()
        return ms, error


@contextmanager
def _buffers(gpu: Gpu, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Addresses by name."""
    held = []
    try:
        addresses = {}
        for name, size in sizes.items():
            held.append(gpu.allocate(max(size, ALIGNMENT)))
            addresses[name] = int(held[-1].handle)
        yield addresses
    finally:
        for buffer in held:
            buffer.close(gpu.stream)


def _blank(
    precision: Precision, machine: Machine, candidate: Candidate, state: Any, problem: str = ""
) -> Figure:
    """A figure without time and error."""
    return Figure(
        candidate.network,
        candidate.name,
        state,
        ms=None,
        error=None,
        tolerance=tolerance(candidate.network, precision, candidate.tier),
        tier=candidate.tier,
        gpu=machine.gpu.name,
        version=machine.version,
        problem=problem,
    )


def _with_choice(figures: Sequence[Figure], free: Collection[str], precision: Precision) -> list[Figure]:
    """The figures, with the tiers that each is the best of; `free` are the candidates to choose from."""
    rivals = [figure for figure in figures if figure.candidate in free]
    best = {tier: ranked[0] for tier in tiers(precision) if (ranked := accurate(rivals, precision, tier))}
    return [
        replace(figure, chosen=", ".join(tier for tier, first in best.items() if first is figure))
        for figure in figures
    ]


def _record(engines: Sequence[EngineId], figures: Sequence[Figure]) -> None:
    for engine in engines:
        if find(engine) is not None:  # one that cannot be built has no manifest
            record_candidates(engine, figures)


def _sentence(problem: Exception) -> str:
    if isinstance(problem, TrtWanError):
        return problem.message
    first = str(problem).splitlines()[:1]
    return ": ".join([type(problem).__name__, *first])
