"""Which candidate computes a network: the fastest that was measured and is accurate enough, else the default.

The figures are those of this GPU and TensorRT, from the manifest of any engine among the network's
candidates. Every choice says why.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from trt_wan.engines.choice.candidates import Candidate, Machine, Tier, candidates, default_order
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.precision import Precision
from trt_wan.engines.store.engine_id import EngineId
from trt_wan.engines.store.manifest import read_manifest
from trt_wan.engines.store.measurements import Figure, title
from trt_wan.errors import GraphError, UsageError

Missing = Callable[[Candidate], str | None]  # why a candidate cannot be used here, in a sentence


@dataclass(frozen=True)
class Choice:
    candidate: Candidate
    reason: str

    @property
    def text(self) -> str:
        return f"{self.candidate.network} = {self.candidate.name} ({self.reason})"


def figures_of(engines: Iterable[EngineId], machine: Machine) -> dict[str, Figure]:
    """What was measured here, by candidate; `engines` are those of one network's candidates."""
    found: dict[str, Figure] = {}
    for engine in engines:
        manifest = read_manifest(engine.key)
        for figure in manifest.candidates if manifest else ():
            if (figure.gpu, figure.version) == (machine.gpu.name, machine.version):
                found.setdefault(figure.candidate, figure)
    return found


def accurate(figures: Iterable[Figure], precision: Precision, tier: Tier) -> list[Figure]:
    """Those that the tier may use, the fastest first."""
    fitting = [f for f in figures if _is_accurate(f, precision, tier) and tier in ("fast", f.tier)]
    return sorted(fitting, key=lambda f: f.ms or 0.0)


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

    `asked` names one that is taken unmeasured or not: UsageError if it cannot be. GraphError if every
    candidate that there is was measured and is too far from fp32.
    """
    rows = {row.name: row for row in candidates(network, precision, machine)}
    if asked is not None:
        return Choice(_asked(rows, network, asked, precision, tier, missing), "asked for")
    usable = {n: row for n, row in rows.items() if tier in ("fast", row.tier) and not row.on_request}
    absent = {name: sentence for name, row in usable.items() if (sentence := missing(row)) is not None}
    here = [figures[name] for name in usable if name not in absent and name in figures]
    if ranked := accurate(here, precision, tier):
        return Choice(rows[ranked[0].candidate], _measured(ranked, tolerance(network, precision, tier)))
    return _default(network, precision, tier, machine, usable, absent, here)


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
    if tier not in ("fast", rows[asked].tier):
        raise UsageError(f"{network} = {asked} belongs to the tier fast.", "Add --tier fast.")
    if (sentence := missing(rows[asked])) is not None:
        raise UsageError(
            f"{network} cannot be {asked} here: {_clause(sentence)}.", "Leave --segment out, or use another."
        )
    return rows[asked]


def _measured(ranked: Sequence[Figure], largest: float) -> str:
    best, *others = ranked
    next_best = [f"{figure.candidate} {figure.ms:.1f} ms" for figure in others[:1]]
    return "; ".join([f"{best.ms:.1f} ms", *next_best, f"error {best.error:.1e} <= {largest:.1e}"])


def _default(
    network: str,
    precision: Precision,
    tier: Tier,
    machine: Machine,
    usable: Mapping[str, Candidate],
    absent: Mapping[str, str],
    figures: Sequence[Figure],
) -> Choice:
    """The first of the default order that is there and was not found wrong."""
    known = {figure.candidate: figure for figure in figures}
    order = [name for name in default_order(network, tier, machine.capability) if name in usable]
    passed = []
    for name in order:
        figure = known.get(name)
        if name in absent:
            passed.append(f"{name}: {_clause(absent[name])}")
        elif figure is not None and figure.state != "failed":
            passed.append(f"{name}: {title(figure)}")
        else:
            major, minor = machine.capability
            ground = f"default for compute capability {major}.{minor}"
            state = f"measuring it failed: {figure.problem}" if figure else "not measured: run trt-wan build"
            return Choice(usable[name], "; ".join([ground, *passed, _clause(state)]))
    raise GraphError(
        f"No candidate for {network} is within {tolerance(network, precision, tier):.1e} of fp32 "
        f"({'; '.join(passed)}).",
        "Measure again with trt-wan build --measure, or take one all the same: --segment "
        f"{network}='{order[0]}'.",
    )


def _clause(sentence: str) -> str:
    return sentence.rstrip(".")
