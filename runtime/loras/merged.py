"""The transformer's tensors with the LoRAs of a job: the base's own, each with the `delta` of all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.runtime.loras.changes import Change, matrix, needs_base
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.stored import Stored, Tensors


@dataclass(frozen=True, eq=False)
class Merge:
    """The `Delta` of one tensor: strengths and changes. Each change is of the unchanged weight, so that their
    order does not matter.
    """

    parts: tuple[tuple[float, Change], ...]

    def add(self, values: NDArray[np.float32], first: int) -> None:
        flat = matrix(values)
        base = flat.copy() if any(needs_base(change) for _, change in self.parts) else flat
        for strength, change in self.parts:
            flat += np.float32(strength) * change.rows(base, first)


class MergedTensors(Mapping[str, NDArray[np.float32]]):
    """`Tensors`. A tensor without a delta is the base's own, bit for bit."""

    def __init__(self, base: Tensors, deltas: Mapping[str, Merge]) -> None:
        self.base, self.deltas = base, deltas

    def stored(self, name: str) -> Stored:
        if name == ORTHONORMAL and DIRECTION in self.deltas:
            return Stored(orthonormal(self[DIRECTION]))
        stored = self.base.stored(name)
        return replace(stored, delta=self.deltas[name]) if name in self.deltas else stored

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.stored(name).float32()

    def rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        return self.stored(name).rows(indices)

    def __contains__(self, name: object) -> bool:
        return name in self.base  # type: ignore[operator]  # Checkpoint is a Mapping

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)  # type: ignore[call-overload,no-any-return]

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]
