"""Measurements of candidates, in $TRT_WAN_HOME/measurements: one file per GPU, TensorRT and graph.

A file holds the figures of all candidates for one network's place: engines, kernels and libraries alike. It
stays when engines are removed.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trt_wan.engines.store.files import read_json, replace_atomically
from trt_wan.engines.store.home import home
from trt_wan.engines.store.locks import held

FORMAT = 1
NUMBERS = ("ms", "error", "tolerance")


@dataclass(frozen=True)
class Figure:
    """The measurement of one candidate. Only the state `measured` has a time and an error; the others say why
    in `problem`.

    `missing`: its library is not installed, or its engine cannot be built. `failed`: it did not run.
    `broken`: its output has NaN.
    """

    network: str
    candidate: str
    state: Literal["measured", "broken", "failed", "missing"]
    ms: float | None  # median time on the GPU
    error: float | None  # against fp32, relative, over the whole sample
    tolerance: float  # its tier's
    tier: str  # the lowest that may use it
    gpu: str
    version: str  # TensorRT's flavour and version
    chosen: str = ""  # the tiers that take it: "exact", "fast", "exact, fast"
    problem: str = ""

    def __post_init__(self) -> None:
        """Raises TypeError: values may come from an edited file."""
        for name, value in asdict(self).items():
            if not (_is_number(value) if name in NUMBERS else isinstance(value, str)):
                raise TypeError(f"{name} is {value!r}")
        if self.tolerance is None:
            raise TypeError("tolerance is None")


@dataclass(frozen=True)
class Place:
    """A network's place on a GPU. `version` is TensorRT's with its flavour, `graph` the hash of the graph."""

    gpu: str
    version: str
    graph: str

    @property
    def file(self) -> Path:
        name = hashlib.sha256(repr((FORMAT, *asdict(self).values())).encode()).hexdigest()[:32]
        return _folder() / f"{name}.json"


def read_figures(place: Place) -> dict[str, Figure]:
    """The figures by candidate; none for a file that is missing or damaged."""
    values = _read(place.file)
    return {figure.candidate: figure for figure in values["figures"]} if values else {}


def record_figures(place: Place, sources: Collection[str], figures: dict[str, Figure]) -> None:
    """Writes figures, by candidate, beside those of other candidates. `sources` name the engines among them.

    Raises OSError.
    """
    with held(place.file.with_suffix(".lock")):
        known = _read(place.file) or {"sources": [], "figures": []}
        merged = {figure.candidate: figure for figure in known["figures"]} | figures
        values = asdict(place) | {
            "sources": sorted(
                {*(source for source in known["sources"] if isinstance(source, str)), *sources}
            ),
            "figures": [asdict(figure) for figure in merged.values()],
        }
        replace_atomically(place.file, json.dumps(values, indent=1), sync=True)


def figures_beside(source: str) -> list[Figure]:
    """The figures for the places of the engine `source`, by all GPUs and versions."""
    found = [_read(path) for path in sorted(_folder().glob("*.json"))]
    return [
        figure for values in found if values and source in values["sources"] for figure in values["figures"]
    ]


def _folder() -> Path:
    return home() / "measurements"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values = read_json(file)
        return {"sources": list(values["sources"]), "figures": [Figure(**f) for f in values["figures"]]}
    except (KeyError, TypeError):
        return None


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, float) or (type(value) is int and abs(value) < 1 << 53)


def title(figure: Figure) -> str:
    """One line for people: the time and the error, or the reason for having neither."""
    if figure.ms is None or figure.error is None:
        return f"{figure.state}: {figure.problem}"
    sign = "<=" if figure.error <= figure.tolerance else ">"
    return f"{figure.ms:.2f} ms, error {figure.error:.1e} {sign} {figure.tolerance:.1e}"
