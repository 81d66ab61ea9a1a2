"""Chooses a network's candidate: the fastest accurate one if all were measured, else the default.

The figures are those of this GPU and TensorRT (engines/store/measurements.py). Every choice has its reason.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from trt_wan.engines.choice.candidates import Candidate, Machine, Tier, candidates, default_order, may_use
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.precision import Precision
from trt_wan.engines.store.measurements import Figure, Place, title
from trt_wan.errors import GraphError, UsageError, with_commands

NOISE = 1.03  # times within 3 % of each other are equal: they change places from one build to the next

Missing = Callable[[Candidate], str | None]  # a sentence that says why a candidate cannot be used here


@dataclass(frozen=True)
class Choice:
    candidate: Candidate
    reason: str
    unmeasured: bool = False  # whether `trt-wan build` would measure and might choose another

    @property
    def text(self) -> str:
        return f"{self.candidate.network} = {self.candidate.name} ({self.reason})"


def place_of(graph: str, machine: Machine) -> Place:
    """`graph` is the hash of the network's graph."""
    return Place(machine.gpu.name, machine.version, graph)


def is_known(candidate: Candidate, figures: Mapping[str, Figure]) -> bool:
    """Whether a candidate that can be used was measured. A library may be installed after it was missing."""
    figure = figures.get(candidate.name)
    return figure is not None and (figure.state != "missing" or candidate.maker == "engine")


def accurate(figures: Iterable[Figure], precision: Precision, tier: Tier) -> list[Figure]:
    """The figures of candidates that the tier may use: the best first, then the others by time.

    The best is the most accurate of those within 3 % of the fastest.
    """
    fitting = [f for f in figures if _is_accurate(f, precision, tier) and may_use(tier, f.tier)]
    ranked = sorted(fitting, key=_ms)
    if ranked:
        as_fast = [figure for figure in ranked if _ms(figure) <= NOISE * _ms(ranked[0])]
        best = min(as_fast, key=lambda figure: figure.error or 0.0)
        ranked.remove(best)
        ranked.insert(0, best)
    return ranked


def _ms(figure: Figure) -> float:
    return figure.ms or 0.0


def _is_accurate(figure: Figure, precision: Precision, tier: Tier) -> bool:
    largest = tolerance(figure.network, precision, tier)
    return figure.ms is not None and figure.error is not None and figure.error <= largest


def choose(
    network: str,
    precision: Precision,
    tier: Tier,
    machine: Machine,
    figures: Mapping[str, Figure],
    missing: Missing,
    asked: str | None = None,
) -> Choice:
    """The candidate for a network's place.

    `asked` forces a candidate, measured or not. Raises UsageError if it cannot be used, and GraphError if
    every candidate was measured and is too far from fp32.
    """
    rows = {row.name: row for row in candidates(network, precision, machine)}
    if asked is not None:
        return Choice(_asked(rows, network, asked, precision, tier, missing), "asked for")
    usable = {n: row for n, row in rows.items() if may_use(tier, row.tier) and not row.on_request}
    absent = {name: sentence for name, row in usable.items() if (sentence := missing(row)) is not None}
    here = {name: figures[name] for name in usable if name not in absent and name in figures}
    ranked = accurate(here.values(), precision, tier)
    finished = all(is_known(row, figures) for name, row in usable.items() if name not in absent)
    if finished and ranked:
        return Choice(rows[ranked[0].candidate], _measured(ranked, tolerance(network, precision, tier)))
    state = "measuring was not finished" if here and not finished else "not measured"
    order = (*default_order(network, tier, machine.capability), *(figure.candidate for figure in ranked))
    order = tuple(dict.fromkeys(name for name in order if name in usable))
    return _default(network, precision, tier, machine, rows, order, absent, here, state)


def _asked(
    rows: Mapping[str, Candidate],
    network: str,
    asked: str,
    precision: Precision,
    tier: Tier,
    missing: Missing,
) -> Candidate:
    if asked not in rows:
        raise UsageError(
            f"{network} cannot be {asked} here, at precision {precision}.", f"Use one of: {', '.join(rows)}."
        )
    if not may_use(tier, lowest := rows[asked].tier):
        raise UsageError(f"{network} = {asked} belongs to the tier {lowest}.", f"Add --tier {lowest}.")
    if (sentence := missing(rows[asked])) is not None:
        raise UsageError(
            f"{network} cannot be {asked} here: {_clause(sentence)}.", "Leave --segment out, or use another."
        )
    return rows[asked]


def _measured(ranked: Sequence[Figure], largest: float) -> str:
    best, *others = ranked
    next_best = [f"{figure.candidate} {figure.ms:.1f} ms" for figure in others[:1]]
    accuracy = f"error {best.error:.1e} <= {largest:.1e}"
    if others and _ms(others[0]) < _ms(best):
        accuracy += ", the more accurate within 3 %"
    return "; ".join([f"{best.ms:.1f} ms", *next_best, accuracy])


def _default(
    network: str,
    precision: Precision,
    tier: Tier,
    machine: Machine,
    rows: Mapping[str, Candidate],
    order: Sequence[str],
    absent: Mapping[str, str],
    known: Mapping[str, Figure],
    state: str,
) -> Choice:
    """The first in order that can be used and was not measured as wrong."""
    passed = []
    for name in order:
        figure = known.get(name)
        wrong = figure is not None and figure.state != "failed" and not _is_accurate(figure, precision, tier)
        if name in absent:
            passed.append(f"{name}: {_clause(absent[name])}")
        elif figure is not None and wrong:
            passed.append(f"{name}: {title(figure)}")
        else:
            major, minor = machine.capability
            ground = f"default for compute capability {major}.{minor}"
            if figure is not None and figure.state == "failed":
                state = f"measuring it failed: {figure.problem}"
            failed = figure is not None and figure.state == "failed"
            reason = "; ".join([ground, *passed, _clause(state)])
            return Choice(rows[name], reason, unmeasured=not failed)
    raise GraphError(
        f"No candidate for {network} is within {tolerance(network, precision, tier):.1e} of fp32 "
        f"({'; '.join(passed)}).",
        with_commands(
            f"Take one all the same with --segment {network}={shlex.quote(order[0])}, or measure again:",
            "trt-wan build --measure",
        ),
    )


def _clause(sentence: str) -> str:
    return sentence.rstrip(".")
