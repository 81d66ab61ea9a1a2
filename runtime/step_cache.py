"""The step cache: MagCache by its published rule (addons_spec.md 4.1) skips the blocks in some steps.

A skipped step embeds the latent, adds R and runs the head. R is float32 [tokens, dim], the residual stream
behind the last block minus that before the first, of the last step that was computed. Each side of the
guidance (0: the prompt's, 1: the negative prompt's) has its own, and so has each context window.

A change from dense to block-sparse attention does not count as another condition: a sparse step may add R
of a dense one.

Which steps are skipped follows from the settings and from `Ratios` alone, so it is known before a run.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trt_wan.errors import UsageError, shown
from trt_wan.runtime.executors import Array
from trt_wan.runtime.fields import check_fields
from trt_wan.runtime.guidance import StepSettings
from trt_wan.runtime.sampling.stepping import Combine

LEAST_STEPS = 15  # below, it does nothing or skips the last steps (addons_spec.md 0.10)
MOST_THRESHOLD = 1.0  # published ones are 0.02 to 0.24
MOST_STEPS, MOST_TOLD = 1000, 20


@dataclass(frozen=True)
class Ratios:
    """The mean over the tokens of |R_s| / |R_{s-1}|, for every step s of a job without a cache. The first of
    a side is 1. Without guidance the negative prompt has none.
    """

    prompt: tuple[float, ...]
    negative: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        possible = all(math.isfinite(ratio) and ratio > 0 for ratio in (*self.prompt, *self.negative))
        if not (possible and 1 < len(self.prompt) <= MOST_STEPS) or len(self.negative) not in (
            0,
            len(self.prompt),
        ):
            raise UsageError(
                "The ratios of a step cache are positive numbers, one for each step, as many on both sides.",
                "Make them with `bench calibrate-cache`.",
            )

    @property
    def sides(self) -> tuple[tuple[float, ...], ...]:
        return (self.prompt, self.negative) if self.negative else (self.prompt,)


@dataclass(frozen=True)
class StepCache:
    """`threshold` 0 computes every step. Without `ratios` they are read from `file`, or found
    (step_ratios.py).
    """

    threshold: float  # skipping ends where the summed error reaches it
    most: int = 2  # steps that are skipped in a row
    retention: float = 0.2  # the share of the steps, from the first, that is always computed
    file: Path | None = None
    ratios: Ratios | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.threshold <= MOST_THRESHOLD:
            raise UsageError(
                f"A step cache threshold of {shown(self.threshold)} is not possible.",
                f"Use --step-cache 0 (off) to {MOST_THRESHOLD:g}, mostly 0.06.",
            )
        if not 1 <= self.most <= MOST_STEPS:
            raise UsageError(
                f"{shown(self.most)} skipped steps in a row are not possible.",
                "Use --step-cache-most 1 or more, mostly 2; --step-cache 0 skips none.",
            )
        if not 0 <= self.retention < 1:
            raise UsageError(
                f"A share of {shown(self.retention)} of the steps is not possible.",
                "Use --step-cache-retention 0 to below 1, mostly 0.2; --step-cache 0 computes all.",
            )


def skipped_steps(
    cache: StepCache,
    ratios: Sequence[float],
    side: int,
    steps: Sequence[StepSettings],
    whole: int,
    first: int,
) -> tuple[bool, ...]:
    """Whether each of `steps` is skipped on a side. They are the steps from `first` of a schedule of `whole`;
    `ratios` of another number of steps are taken at the nearest places. A step under other conditions than
    the one before is computed.
    """
    always = int(2 * len(steps) * cache.retention)  # published for the steps of both sides in turn
    made = []
    ratio, error, count, before = 1.0, 0.0, 0, None
    for i, now in enumerate(steps):
        conditions = now.passes, replace(now, guidance=1.0)
        skip = False
        if side < now.passes and conditions == before and 2 * i + side >= always:
            ratio *= ratios[round((first + i) * (len(ratios) - 1) / (whole - 1))]
            error, count = error + abs(1 - ratio), count + 1
            skip = error < cache.threshold and count <= cache.most
        if not skip:
            ratio, error, count = 1.0, 0.0, 0
        before = conditions
        made.append(skip)
    return tuple(made)


@dataclass
class Residual:
    """R of one side and context window of a window, held only while a later step adds it."""

    combine: Combine
    skipped: Sequence[bool]
    skips: bool = False  # whether the step of `at` is skipped
    _adds: bool = False  # whether the step after it is
    _kept: Array | None = None
    _entered: Array | None = None

    def at(self, step: int) -> "Residual | None":
        """For `velocity` in that step. None if the cache has nothing to do there."""
        self.skips = self.skipped[step]
        self._adds = step + 1 < len(self.skipped) and self.skipped[step + 1]
        if not self.skips:
            self._kept = None  # its memory is free for the blocks
        return self if self.skips or self._adds else None

    def enter(self, x: Array) -> None:
        """Takes the residual stream before the first block."""
        if not self.skips:
            self._entered = x

    def leave(self, x: Array) -> Array:
        """Returns the residual stream behind the last block, from that behind those that were computed."""
        if not self.skips:
            self._kept = self.combine([(1.0, x), (-1.0, self._entered)])
            self._entered = None
            return x
        assert self._kept is not None, "a skipped step follows a computed one"
        made: Array = self.combine([(1.0, x), (1.0, self._kept)])
        if not self._adds:
            self._kept = None
        return made


@dataclass
class Residuals:
    """Those of one window of the loop. `skips` has the steps of every side."""

    combine: Combine
    skips: Sequence[Sequence[bool]]
    _made: dict[Hashable, list[Residual]] = field(default_factory=dict)

    def of(self, part: Hashable) -> list[Residual]:
        """One for each side. `part` tells context windows apart."""
        if part not in self._made:
            self._made[part] = [Residual(self.combine, skipped) for skipped in self.skips]
        return self._made[part]


def numbers(side: Sequence[bool]) -> list[int]:
    """The skipped steps of a side, from 1."""
    return [i for i, skipped in enumerate(side, 1) if skipped]


def told_skips(skips: Sequence[Sequence[bool]]) -> str:
    """The skipped steps of every side."""
    said = []
    for side in skips:
        skipped = [str(i) for i in numbers(side)]
        more = [f"{len(skipped) - MOST_TOLD} more"] if len(skipped) > MOST_TOLD else []
        listed = f" ({', '.join([*skipped[:MOST_TOLD], *more])})" if skipped else ""
        said.append(f"{len(skipped)} of {len(side)} steps{listed}")
    return ", and for the negative prompt ".join(said)
