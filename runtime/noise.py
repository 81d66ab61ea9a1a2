"""Starting noise, equal to the noise of torch's CPU generator for the same seed, so users keep their seeds.

This module knows no latents or windows. A generator draws any shape and continues where the last draw ended.

torch makes normals from a seed as follows, and this module repeats it:
- The engine is MT19937, 32 bits per draw. Only the low 32 bits of the seed reach it, so seeds that differ in
  the high bits give the same noise. numpy's legacy `RandomState` seeds and draws identically.
- 16 values or more (float32 throughout): one draw per value, its low 24 bits taken as a fraction of 1. Blocks
  of 16 become normals by Box-Muller: value j gives the radius and value j+8 the angle of a point. Its x
  stays at j and its y goes to j+8. When the size is no multiple of 16, a block from 16 new draws replaces the
  last 16 values.
- Fewer than 16 values (float64, rounded at the end): two joined draws, the first one high, give 53 bits. One
  such fraction is the angle, the next the radius. x is the value, y is kept for the next value, across calls.

torch has its own approximations of log, sin and cos: in a latent the two are at most 7e-7 apart (torch 2.13).
"""

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import UsageError, shown
from trt_wan.runtime.fields import check_fields

F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]

BLOCK = 16
WORDS = 624
TWO_PI = np.float32(2 * math.pi)


@dataclass(frozen=True)
class GeneratorState:
    """A place in the sequence of a generator. JSON keeps all three values exactly."""

    engine: str  # the 624 words of MT19937, 8 hexadecimal digits each
    position: int  # words of `engine` that are used up, 0…624
    kept: float | None  # the second normal of a pair, due in the next short draw

    def __post_init__(self) -> None:
        check_fields(self)
        if not (re.fullmatch(f"[0-9a-f]{{{8 * WORDS}}}", self.engine) and 0 <= self.position <= WORDS):
            raise UsageError(
                "This is not the state of a generator of noise.", "Take it from CpuGenerator.state()."
            )


class CpuGenerator:
    """Draws the numbers of `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`."""

    def __init__(self, seed: int) -> None:
        """UsageError unless -2^63 <= seed < 2^64. As in torch, a negative seed is its two's complement."""
        if not -(2**63) <= seed < 2**64:
            raise UsageError(
                f"The seed {shown(seed)} does not fit in 64 bits.",
                f"Use --seed {seed % 2**64}, or any number from 0 to {2**64 - 1}.",
            )
        self._engine = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept: float | None = None

    def state(self) -> GeneratorState:
        """The place of the next draw."""
        engine = self._engine.get_state(legacy=False)["state"]
        return GeneratorState(engine["key"].astype(">u4").tobytes().hex(), int(engine["pos"]), self._kept)

    @classmethod
    def from_state(cls, state: GeneratorState) -> Self:
        """A generator that draws next the numbers that were due when `state` was taken."""
        made = cls(0)
        words = np.frombuffer(bytes.fromhex(state.engine), ">u4").astype(np.uint32)
        made._engine.set_state(("MT19937", words, state.position, 0, 0.0))
        made._kept = state.kept
        return made

    def randn(self, shape: Sequence[int]) -> F32:
        """Returns standard normals, float32. Each call continues the sequence."""
        size = math.prod(shape)
        values = self._blocks(size) if size >= BLOCK else self._one_by_one(size)
        return values.reshape(tuple(shape))

    def randn_beside(self, shape: Sequence[int]) -> Callable[[], F32]:
        """`randn` in a thread: for a window of the 14B it takes 0.03 to 0.07 s. Call the returned function
        before the generator is used again.
        """
        thread = ThreadPoolExecutor(1, "noise")
        drawn = thread.submit(self.randn, shape)
        thread.shutdown(wait=False)
        return drawn.result

    def permutation(self, count: int) -> NDArray[np.int64]:
        """The numbers of `torch.randperm(count)`, below 2^32 / 20: each place swaps with one from it on."""
        order = np.arange(count)
        draws = self._draw(max(count - 1, 0))
        for place, draw in enumerate(draws.tolist()):
            other = place + draw % (count - place)
            order[[place, other]] = order[[other, place]]
        return order

    def _draw(self, count: int) -> U32:
        return self._engine.randint(0, 2**32, count, dtype=np.uint32)

    def _blocks(self, size: int) -> F32:
        draws = self._draw(size)
        whole = size // BLOCK * BLOCK
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(draws[:whole])
        if whole < size:
            values[-BLOCK:] = _box_muller(self._draw(BLOCK))
        return values

    def _one_by_one(self, size: int) -> F32:
        return np.array([self._next_normal() for _ in range(size)], np.float32)

    def _next_normal(self) -> float:
        if self._kept is not None:
            value, self._kept = self._kept, None
            return value
        angle = 2 * math.pi * self._fraction53()
        radius = math.sqrt(-2 * math.log1p(-self._fraction53()))
        self._kept = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _fraction53(self) -> float:
        high, low = self._draw(2).tolist()
        bits: int = (high << 32 | low) & (2**53 - 1)
        return bits * 2.0**-53


def _box_muller(draws: U32) -> F32:
    """Converts whole blocks of draws to as many normals."""
    fractions = (draws & np.uint32(0xFFFFFF)).astype(np.float32)
    fractions *= np.float32(2**-24)
    first, second = fractions.reshape(-1, 2, BLOCK // 2).transpose(1, 0, 2)
    radius = np.log(1 - first)  # 1 - fraction is in (0, 1]: the logarithm is finite
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle = TWO_PI * second
    normals = np.empty((len(radius), 2, BLOCK // 2), np.float32)
    np.multiply(radius, np.cos(angle), out=normals[:, 0])
    np.multiply(radius, np.sin(angle), out=normals[:, 1])
    return normals.reshape(-1)
