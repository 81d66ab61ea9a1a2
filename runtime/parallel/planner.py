"""How the ranks share a step: by tokens, by the sides of the guidance, or by context windows.

Tokens always go, at a cost: keys, queries, values and results cross between the GPUs in every block. Sides
and context windows are whole forwards, so nothing crosses but their velocities. But there are two sides, and
as many windows as the clip needs, which may leave ranks idle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan, ShardPlan
from trt_wan.errors import UsageError

Split = Literal["tokens", "sides", "windows"]

# The time of a step split by tokens over N GPUs, as a share of 1/N of one GPU's: 832x480x77, FP8.
# Two: counted from a link of 390 GB/s (reference h200_measurements.md), more: twice that for each doubling.
OVERHEAD = {1: 0.0, 2: 0.05}


def overhead(count: int) -> float:
    return OVERHEAD.get(count, 0.05 * math.sqrt(count - 1))


@dataclass(frozen=True)
class Choice:
    split: Split
    text: str  # says why


def groups_of(heads: int) -> int:
    """In how many groups a rank attends with its heads: those of the next cross meanwhile. Small groups fill
    a GPU less well.
    """
    return next(groups for groups in (4, 2, 1) if heads % groups == 0)


def share_plan(config: ModelConfig, plan: Plan, count: int, overlaps: bool) -> ShardPlan:
    """The share of one of `count` GPUs. `overlaps`: whether ranks exchange heads while they attend with
    others, as they do on GPUs.
    """
    heads = -(-config.transformer.heads // count)
    return ShardPlan.of(plan, count, groups_of(heads) if overlaps else 1)


def choose_split(passes: Sequence[int], parts: int, count: int, beside: Sequence[str] = ()) -> Choice:
    """`passes` of every step through the transformer: 2 with guidance. `parts` are the context windows of a
    step. `beside` are options of networks that take all tokens. Raises UsageError if nothing can be split.
    """
    forwards = sum(passes) * parts
    times: dict[Split, float] = {}
    if not beside:
        times["tokens"] = forwards / count * (1 + overhead(count))
    if parts > 1:
        times["windows"] = sum(passes) * -(-parts // count)
    if max(passes) > 1:
        times["sides"] = len(passes) * parts
    if not times:
        raise UsageError(
            f"{' and '.join(beside)} cannot be split over {count} GPUs: every GPU would do the whole work.",
            "Leave --gpus out, or give --guidance above 1: then two GPUs take a side each.",
        )
    best = min(times, key=lambda split: times[split])
    what = {
        "tokens": "every forward is split by tokens",
        "windows": f"each GPU takes whole context windows, {parts} a step",
        "sides": "two GPUs take a side of the guidance each",
    }
    others = ", ".join(f"{split} {forwards / time:.2f}" for split, time in times.items() if split != best)
    rest = f"; {others}" if others else ""
    return Choice(
        best, f"{count} GPUs: {what[best]} (counted: {forwards / times[best]:.2f} times one GPU{rest})."
    )
