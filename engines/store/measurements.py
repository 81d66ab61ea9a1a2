"""What a build measured of a candidate on one GPU, as it stands in the manifests of engines."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """All states but `measured` say why in `problem` and have neither time nor error. `missing`: its library
    was not there, or its engine could not be built; `failed`: it did not run; `broken`: its output has NaN.
    """

    network: str
    candidate: str
    state: Literal["measured", "broken", "failed", "missing"]
    ms: float | None  # median time on the GPU
    error: float | None  # against fp32, relative, over the whole sample
    tolerance: float  # of its tier
    tier: str  # the lowest that may use it
    gpu: str
    version: str  # of TensorRT, with its flavour
    chosen: str = ""  # the tiers that take it: "exact", "fast", "exact, fast"
    problem: str = ""


def title(figure: Figure) -> str:
    """One line for people: how fast and how wrong, or why neither is known."""
    if figure.ms is None or figure.error is None:
        return f"{figure.state}: {figure.problem}"
    sign = "<=" if figure.error <= figure.tolerance else ">"
    return f"{figure.ms:.2f} ms, error {figure.error:.1e} {sign} {figure.tolerance:.1e}"
