"""The state between two windows of the loop: everything that the next window takes from those before it.

A job that begins from a state computes the same bits as one that was never interrupted.
"""

from dataclasses import dataclass

from trt_wan.runtime.executors import Array
from trt_wan.runtime.noise import GeneratorState


@dataclass(frozen=True, eq=False)
class WindowState:
    """The state after `done` finished windows. Arrays are float32, on the host."""

    done: int
    carried: Array | None  # the last decoded frames [3, overlap, H, W], in [-1, 1]; None before window 1
    generator: GeneratorState
    latent: Array  # the finished window's, [16, slots, h, w]; slot 0 is the reference's
    colours: Array | None = None  # float64: the figures of Matching so far (colour.py)
