"""Executors run the graphs. An executor knows tensors by name and nothing of models, windows or files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import Network

Array = NDArray[np.generic]  # or an executor's own, which has a shape and which numpy can read

# Slots of the result that the slots of an array go to, one weight for each, and the array (float32).
BlendPart = tuple[Sequence[int], Sequence[float], Array]


class Executor(Protocol):
    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        """Runs `network` with its `n`-th set of weights; returns its outputs in the contract's order."""
        ...

    def place(self, array: Array) -> Array:
        """`array` where inputs are wanted."""
        ...

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        """The sum of coefficient·array in float32, added in the order given: the samplers' arithmetic."""
        ...

    def dot(self, x: Array, y: Array) -> float:
        """The sum of the products of two float32 arrays, in float64. Waits for it."""
        ...

    def take(self, array: Array, slots: Sequence[int]) -> Array:
        """Slots of an array [channels, slots, h, w], in the order given; a slot may be repeated."""
        ...

    def join(self, arrays: Sequence[Array]) -> Array:
        """Arrays [channels, slots, h, w] one after the other along their slots."""
        ...

    def blend(self, slots: int, parts: Sequence[BlendPart], onto: Array | None = None) -> Array:
        """Returns float32 [channels, slots, h, w]: weight·slot k of every part is added to its slot of the
        result, in the order given. A slot that no part names is 0. With `onto`, an earlier result, all is
        added to that in place.
        """
        ...

    def put_rows(self, onto: Array, array: Array, start: int, stop: int) -> Array:
        """Copies rows [start, stop) of `array` over those of `onto`, of the same shape, in place. Returns
        `onto`.
        """
        ...

    def is_finite(self, array: Array) -> bool:
        """Whether an array holds neither a NaN nor an infinity. Waits for it."""
        ...

    def fetch(self, array: Array) -> Callable[[], Array]:
        """Returns a function that waits for the array and returns it on the host. Work that is asked
        for after this call goes on meanwhile.
        """
        ...

    def wait(self) -> None:
        """Returns when everything asked for so far is computed."""
        ...

    def settle(self) -> None:
        """Call when every network has run once: compiled kernels are kept on disk for later starts."""
        ...

    def release(self, names: set[str]) -> None:
        """Forgets the weights of some networks."""
        ...


Observe = Callable[[Executor], Executor]  # wraps an executor to watch it
