"""The parts of a latent that one forward of the model takes, and the weights of their velocities.

The model sees the reference in its first slot, and other pictures behind it (references.py). By default these
are the first slots of the whole latent for every part; their velocity is the mean over the parts. With compat
"kijai" slot 0 is a slot of the axis like the others, as in ComfyUI-WanVideoWrapper: a later window puts a
slot of the video in the place of the reference, with that slot's noise. With linear weights its velocity
counts 0 there; with pyramid it leaks into the video.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trt_wan.runtime.context import fuse, schedules
from trt_wan.runtime.context.settings import Compat, Context
from trt_wan.runtime.executors import Array
from trt_wan.runtime.noise import CpuGenerator


@dataclass(frozen=True)
class Part:
    slots: tuple[int, ...]  # in the whole latent, one for every slot of the model
    weights: tuple[float, ...]  # those of a slot sum to 1 over all parts
    shared: int = 1  # slots of pictures, the first of every part

    @property
    def seen(self) -> list[int]:
        """Slots whose condition the model gets: the reference's comes first in every part."""
        return [0, *self.slots[1:]]

    @property
    def posed(self) -> list[int]:
        """Latents of the pose, which has none for the reference."""
        return [slot - 1 for slot in self.slots[1:]]

    @property
    def latents(self) -> list[int]:
        """Latent frames of the video, behind the pictures."""
        return [slot - self.shared for slot in self.slots[self.shared :]]

    @property
    def frames(self) -> list[int]:
        """Pixel frames behind the pictures: one of the first latent, four of each other. Those of latent 0
        are frame 0, four times.
        """
        first, *others = self.latents
        return [4 * first, *(max(4 * latent - 3 + k, 0) for latent in others for k in range(4))]


@dataclass(frozen=True)
class ContextPlan:
    """Context windows of one latent. `slots` and `size` include the `shared` slots of pictures."""

    context: Context
    slots: int  # the whole latent
    size: int  # one forward, at most `slots`
    compat: Compat | None = None
    shared: int = 1

    def parts(self, step: int) -> tuple[Part, ...]:
        """The parts of a step, from 0."""
        return _parts(self, 0 if self.context.schedule == "static_standard" else step)

    @property
    def is_one(self) -> bool:
        """Whether one forward takes the whole latent, so that there is nothing to fuse."""
        return self.slots == self.size

    def reorder(self, noise: Array, generator: CpuGenerator) -> Array:
        """FreeNoise (kijai_semantics.md 3.6): blocks of slots behind the first window repeat earlier blocks
        in another order. Pictures are left alone, unless compat is "kijai".
        """
        if not self.context.freenoise:
            return noise
        first = 0 if self.compat else self.shared
        free_noise(noise[:, first:], self.size - first, self.context.latent_overlap, generator)
        return noise


def free_noise(noise: Array, size: int, overlap: int, generator: CpuGenerator) -> None:
    """Reorders `noise` [channels, slots, h, w] in place."""
    slots, distance = noise.shape[1], size - overlap
    for to in range(size, slots, distance):
        count = min(distance, slots - to)
        order = generator.permutation(count)
        noise[:, to : to + count] = noise[:, to - size + order]


@lru_cache(maxsize=64)  # more than the steps of a usual job
def _parts(plan: ContextPlan, step: int) -> tuple[Part, ...]:
    slots, raw = _wrappers(plan, step) if plan.compat else _balanced(plan, step)
    sums = np.zeros(plan.slots)
    for row, weights in zip(slots, raw, strict=True):
        np.add.at(sums, row, weights)
    assert (sums > 0).all(), f"slots without a weight: {np.flatnonzero(sums <= 0)}"
    return tuple(
        Part(tuple(row), tuple((weights / sums[row]).tolist()), plan.shared)
        for row, weights in zip(slots, raw, strict=True)
    )


def _balanced(plan: ContextPlan, step: int) -> tuple[list[list[int]], list[fuse.F64]]:
    context, shared = plan.context, plan.shared
    length, size = plan.slots - shared, plan.size - shared
    starts = schedules.balanced(context.schedule, length, size, context.latent_overlap, step)
    looped = context.schedule == "uniform_looped" and len(starts) > 1
    slots, raw = [], []
    for i, start in enumerate(starts):
        before, after = size - (start - starts[i - 1]), size - (starts[(i + 1) % len(starts)] - start)
        if i == 0:
            before = before - length if looped else 0
        if i == len(starts) - 1:
            after = after - length if looped else 0
        slots.append([*range(shared), *((start + k) % length + shared for k in range(size))])
        weights = fuse.fades(context.fuse, size, before, after)
        raw.append(np.concatenate((np.ones(shared), weights)))
    return slots, raw


def _wrappers(plan: ContextPlan, step: int) -> tuple[list[list[int]], list[fuse.F64]]:
    context, overlap = plan.context, plan.context.latent_overlap
    starts = schedules.wrappers(context.schedule, plan.slots, plan.size, overlap, step)
    slots = [list(range(start, start + plan.size)) for start in starts]
    raw = [
        fuse.wrappers(context.fuse, plan.size, overlap, row[0] == 0, row[-1] == plan.slots - 1)
        for row in slots
    ]
    return slots, raw
