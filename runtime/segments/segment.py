"""A segment computes one network on the GPU: a TensorRT engine, a library's attention, or native kernels.

It knows its network's tensors by name and address. It knows no model, no weight file and no arena.
"""

from collections.abc import Mapping
from typing import Protocol


class Segment(Protocol):
    """Enqueues on the compute stream of its `Gpu`, never waits, and takes no memory after `start`."""

    @property
    def scratch_bytes(self) -> int:
        """Bytes that it needs of the scratch, which all segments share."""
        ...

    def start(self, scratch: int) -> None:
        """Takes the address of at least `scratch_bytes`, a multiple of 256. Other segments write there
        between two calls of `enqueue`.
        """
        ...

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Takes the address of every input, weight and output, by the contract's names."""
        ...

    def settle(self) -> None:
        """Call after a run. Saves compiled kernels for later starts."""
        ...
