"""Frames as they come: in batches, for several readers, with a word now and then on how far they are."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from trt_wan.preprocess.video import Picture
from trt_wan.runtime.events import Progress, StageStarted

BATCH = 16
BATCH_PIXELS = 48_000_000  # at most, whatever the frames' size: 144 MB
REPORTS = 10  # per pass over a clip

Item = TypeVar("Item")


def batches(frames: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Fewer at once of large frames."""
    coming = iter(frames)
    for first in coming:
        size = min(BATCH, max(1, BATCH_PIXELS // (first.shape[0] * first.shape[1])))
        yield [first, *islice(coming, size - 1)]


def split(items: Iterable[Item], readers: int) -> list[Iterator[Item]]:
    """The same items for several readers, of whom none is far ahead of the others: what lies between is kept.

    As itertools.tee, but that also keeps up to 57 items that everybody has read, gigabytes of 8K frames.
    """
    coming = iter(items)
    waiting: list[deque[Item]] = [deque() for _ in range(readers)]

    def read(mine: deque[Item]) -> Iterator[Item]:
        while True:
            if not mine:
                for item in islice(coming, 1):
                    for queue in waiting:
                        queue.append(item)
                if not mine:
                    return
            yield mine.popleft()

    return [read(queue) for queue in waiting]


def counted(items: Iterable[Item], count: int, stage: str, progress: Progress) -> Iterator[Item]:
    """The items, with a report every now and then of how far they are."""
    step = max(1, -(-count // REPORTS))
    for k, item in enumerate(items):
        if k % step == 0:
            progress(StageStarted(f"{stage}, frame {k + 1} of {count}"))
        yield item
