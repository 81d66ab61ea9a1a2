"""What computes a network on the GPU: a TensorRT engine, a library's attention, or kernels of our own.

A segment knows its network's tensors by name and address, and nothing of models, weights' files or arenas.
"""

from collections.abc import Mapping
from typing import Protocol


class Segment(Protocol):
    """Enqueues on the compute stream of its `Gpu`, never waits, and takes no memory after `start`."""

    @property
    def scratch_bytes(self) -> int:
        """What it wants of the scratch that all segments share."""
        ...

    def start(self, scratch: int) -> None:
        """`scratch` is the address of at least `scratch_bytes`, a multiple of 256; between two calls of
        `enqueue` others write there.
        """
        ...

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """`addresses` has every input, weight and output of the network, by the contract's names."""
        ...

    def settle(self) -> None:
        """Says that it has run: what later starts can use is kept."""
        ...
