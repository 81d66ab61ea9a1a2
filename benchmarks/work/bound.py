"""The lower bound of a step's time on this machine, network by network, beside the measured time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trt_wan.benchmarks.machine.card import Datasheet
from trt_wan.benchmarks.machine.ceilings import Ceiling
from trt_wan.benchmarks.work.cost import Calls, Unit, Work, seconds_at_best

ATTENTION = "attention"


@dataclass(frozen=True)
class Rates:
    """In FLOP/s and bytes/s. `about` names their source."""

    units: Mapping[Unit, float]
    bytes_per_second: float
    about: str


@dataclass(frozen=True)
class NetworkTime:
    """A network in one step: its measured time and its lower bound."""

    name: str
    calls: int
    flops: int
    bytes: int
    seconds: float
    bound_seconds: float | None  # None if no ceiling was measured or no work is counted

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flops / self.seconds if self.seconds else 0.0


def measured_rates(ceilings: Sequence[Ceiling], attention: float | None) -> Rates | None:
    """`attention` is the rate of the fastest measured attention, FLOP/s. Returns None if a ceiling that every
    step needs was not measured.
    """

    def best(name: str) -> float | None:
        rates = [c.rate for c in ceilings if c.name.endswith(name) and c.rate is not None]
        return max(rates, default=None)

    copy, linear = best("copy"), best("bf16 GEMM") or best("fp32 GEMM")
    if copy is None or linear is None or attention is None:
        return None
    fp8 = best("fp8 GEMM")
    units: dict[Unit, float] = {"linear": linear, "attention": attention, "convolution": linear}
    if fp8 is not None:
        units["linear fp8"] = fp8
    return Rates(units, copy, "GEMM and copy as measured here, attention at the rate of its fastest call")


def budget_rates(ceilings: Sequence[Ceiling], fp8_attention: bool) -> Rates | None:
    """`measured_rates` with attention at the rate of the fastest products of its type."""
    kinds = ("fp8 GEMM", "bf16 GEMM", "fp32 GEMM")[0 if fp8_attention else 1 :]
    best = {kind: max((c.rate or 0.0 for c in ceilings if c.name == kind), default=0.0) for kind in kinds}
    kind = next((kind for kind in kinds if best[kind]), None)
    if kind is None or (rates := measured_rates(ceilings, best[kind])) is None:
        return None
    return replace(rates, about=f"floors: GEMM and copy as measured here, attention as {kind}")


def datasheet_rates(sheet: Datasheet, fp8_attention: bool) -> Rates:
    fp8 = sheet.fp8 or sheet.bf16
    units: dict[Unit, float] = {
        "linear": sheet.bf16,
        "linear fp8": fp8,
        "attention": fp8 if fp8_attention else sheet.bf16,
        "convolution": sheet.bf16,
    }
    return Rates(units, sheet.bandwidth, "the datasheet's dense peaks")


def attention_rate(work: Mapping[str, Work], profile: Sequence[Mapping[str, float | str]]) -> float | None:
    """Returns FLOP/s of the fastest attention call in a profile."""
    fastest = [float(row["fastest"]) for row in profile if row["name"] == ATTENTION]
    return work[ATTENTION].flops / min(fastest) if fastest else None


def step_bound(work: Mapping[str, Work], calls: Mapping[str, Calls], rates: Rates) -> float | None:
    """Returns the sum of all networks' lower bounds in seconds; None if one of them is unknown."""
    total = 0.0
    for name, w in work.items():
        if calls[name].step:
            least = seconds_at_best(w, rates.units, rates.bytes_per_second)
            if least is None:
                return None
            total += calls[name].step * least
    return total


def network_times(
    work: Mapping[str, Work], profile: Sequence[Mapping[str, float | str]], rates: Rates | None
) -> list[NetworkTime]:
    """Returns every network of a step, the longest first."""
    found = []
    for row in profile:
        name, calls = str(row["name"]), int(row["calls"])
        w = work.get(name, Work())
        least = None
        if rates is not None and name in work:
            once = seconds_at_best(w, rates.units, rates.bytes_per_second)
            least = None if once is None else calls * once
        found.append(NetworkTime(name, calls, calls * w.flops, calls * w.bytes, float(row["seconds"]), least))
    return sorted(found, key=lambda row: -row.seconds)
