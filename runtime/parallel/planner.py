"""How the ranks share a step: by tokens, by the sides of the guidance, or by context windows.

Tokens always go, at a cost: keys, queries, values and results cross between the GPUs in every block. Sides
and context windows are whole forwards, so nothing crosses but their velocities. But there are two sides, and
as many windows as the clip needs, which may leave ranks idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trt_wan.errors import UsageError
from trt_wan.runtime.parallel.shards import Shards

Split = Literal["tokens", "sides", "windows"]

# The time of a step split by tokens over N GPUs, beyond 1/N of one GPU's. H200s, 832x480x77 in FP8: 0.068 on
# two and 0.072 on four (docs/log.md).
OVERHEAD = 0.07

# Measured on H200s (docs/log.md): attention by our kernels takes a tile of queries on every multiprocessor at
# a time, and each wave of tiles takes the same time. Seconds for a query and a key, by the queries of a tile:
# 20 heads of 32760 tokens are 39 waves of 128, 40 heads 52 of 192.
WAVE = {128: 12.13e-3 / 39 / 32760 / 128, 192: 22.55e-3 / 52 / 32760 / 192}
GROUP = 0.02e-3  # seconds of a call more
LINK = 390e9  # bytes a second to other GPUs
INSIDE = 750e9  # bytes a second from and to one GPU, by kernels that attention waits for


@dataclass(frozen=True)
class Choice:
    split: Split
    text: str  # says why


def groups_of(shards: Shards, processors: int, queries: int = 128) -> tuple[int, ...]:
    """The groups that a rank's heads are attended in, so that `attend_seconds` is least. While one is
    attended, the next ones arrive and the last one's results go back.

    Computed for H200s, in ms of one `attend` (in one group) without the constant, in tiles of 128 queries and
    of 192, which fewer divisions fill:

        ranks                832x480x77                         1280x720x77
        2     128            1, 18, 1:  12.66 (13.01)           2, 16, 2:  65.79 (66.60)
              128, to_rows   1, 18, 1:  12.23 (13.01)           2, 16, 2:  64.86 (66.60)
              192            10, 10:    11.97 (12.16)           1, 18, 1:  61.18 (62.05)
              192, to_rows   10, 10:    11.75 (12.16)           1, 18, 1:  60.20 (62.05)
        4     192, to_rows   1, 6, 3:    6.23  (6.30)           1, 8, 1:   30.23 (31.53)
        8     192, to_rows   2, 3:       3.24  (3.43)           1, 3, 1:   15.24 (15.90)

    Measured on two H200s in tiles of 128 without `to_rows`: 12.87 (13.11), and 13.05 in groups of 2 and 18.
    """
    heads = shards.heads_each
    choices = [(heads,), *((a, heads - a) for a in range(1, heads))]
    choices += [(a, b, heads - a - b) for a in range(1, heads) for b in range(1, heads - a)]
    return min(choices, key=lambda groups: (attend_seconds(shards, groups, processors, queries), groups))


def attend_seconds(shards: Shards, groups: Sequence[int], processors: int, queries: int = 128) -> float:
    """The time of one `attend` of bf16 with groups of so many heads, on GPUs of that many multiprocessors,
    each of which takes a tile of `queries` at a time. A constant is left out: 0.18 ms on H200s, less with
    `to_rows`.
    """
    tokens = shards.slots * shards.slot_tokens
    tiles = -(-tokens // queries)
    head = 2 * shards.slots * shards.share * shards.head_dim  # bytes of a rank's q
    crossing = (shards.ranks - 1) * head / LINK
    arrived = attended = returned = 0.0
    for heads in groups:
        waves = -(-heads * tiles // processors)
        arrived += 3 * heads * crossing
        attended = max(attended, arrived) + GROUP + waves * tokens * queries * WAVE[queries]
        returned = max(returned, attended) + heads * crossing
    if shards.to_rows:
        return returned
    # The first group's own part is copied while the other one arrives, the last one's while that returns.
    copied = 3 * (shards.heads_each - groups[0]) + shards.heads_each - groups[-1]
    return returned + copied * head / INSIDE


def choose_split(
    passes: Sequence[int], parts: int, count: int, beside: Sequence[str] = (), on_gpus: bool = True
) -> Choice:
    """`passes` of every step through the transformer: 2 with guidance. `parts` are the context windows of a
    step. `beside` are options of networks that take all tokens. Raises UsageError if nothing can be split.
    The text has the expected speed only with `on_gpus`: it was measured there.
    """
    forwards = sum(passes) * parts
    times: dict[Split, float] = {}
    if not beside:
        times["tokens"] = forwards / count * (1 + OVERHEAD)
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
    text = f"{count} GPUs: {what[best]}"
    if not on_gpus:
        return Choice(best, f"{text}.")
    others = ", ".join(f"{split} {forwards / time:.2f}" for split, time in times.items() if split != best)
    rest = f"; {others}" if others else ""
    return Choice(best, f"{text} (about {forwards / times[best]:.2f} times one GPU{rest}).")
