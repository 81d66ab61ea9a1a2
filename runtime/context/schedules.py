"""Where context windows start: lists of first latents, of `length` latents in all.

`balanced` has the fewest windows that overlap enough, an equal distance apart. `wrappers` are those of
ComfyUI-WanVideoWrapper (kijai_semantics.md 3.3), where the last two may overlap almost fully. A window of
`size` latents goes on at latent 0 when it passes the end, which uniform_looped alone does.
"""

import math
from fractions import Fraction

from trt_wan.runtime.context.settings import Schedule


def halving(step: int) -> Fraction:
    """0, 1/2, 1/4, 3/4, 1/8, …: the bits of `step` behind the point, the lowest first (64 of them)."""
    return Fraction(int(f"{step:064b}"[::-1], 2), 1 << 64)


def balanced(schedule: Schedule, length: int, size: int, overlap: int, step: int) -> list[int]:
    """First latents, rising. The uniform schedules move the windows by a part of their distance in a step;
    uniform_standard keeps one at each end.
    """
    if length <= size:
        return [0]
    shift = Fraction(0) if schedule == "static_standard" else halving(step)
    if schedule == "uniform_looped":
        count = -(-length // (size - overlap))
        return sorted(_rounded((i + shift) * Fraction(length, count)) % length for i in range(count))
    count = -(-(length - overlap) // (size - overlap))
    distance = Fraction(length - size, count - 1)
    return sorted({0, *(_rounded((i + shift) * distance) for i in range(count - 1)), length - size})


def wrappers(schedule: Schedule, length: int, size: int, overlap: int, step: int) -> list[int]:
    """First latents, in the wrapper's order."""
    if length <= size:
        return [0]
    last, distance = length - size, size - overlap
    if schedule == "static_standard":
        return [*range(0, last, distance), last]
    shift = round(length * halving(step))
    starts = [start % length for start in range(shift, length + shift, distance)]
    if schedule == "uniform_looped":
        return starts
    return list(dict.fromkeys(_unwrapped(starts, last)))


def _unwrapped(starts: list[int], last: int) -> list[int]:
    """Moves windows that pass the end back to it. Where the next window does not hold latent 0 then, one from
    there is inserted.
    """
    k = 0
    while k < len(starts):
        if starts[k] > last:
            starts[k] = last
            after = starts[(k + 1) % len(starts)]
            if 0 < after <= last:
                starts.insert(k + 1, 0)
        k += 1
    return starts


def _rounded(number: Fraction) -> int:
    """Half goes up: of numbers an equal distance d apart no two are further apart than ceil(d)."""
    return math.floor(number + Fraction(1, 2))
