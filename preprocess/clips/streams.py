"""Streams of frames: in batches, read ahead by a thread, split among several readers, counted for reports."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Lock
from typing import TypeVar

from trt_wan.runtime.events import Progress, StageProgress
from trt_wan.runtime.video.reader import Picture

BATCH = 16
BATCH_PIXELS = 48_000_000  # upper limit for frames of any size: 144 MB
READ_AHEAD = 2  # frames
REPORTS = 10  # per pass over a clip

Item = TypeVar("Item")


def batches(frames: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Lists of up to BATCH frames, fewer if frames are large."""
    coming = iter(frames)
    for first in coming:
        size = min(BATCH, max(1, BATCH_PIXELS // (first.shape[0] * first.shape[1])))
        yield [first, *islice(coming, size - 1)]


def ahead(items: Iterable[Item], count: int) -> Generator[Item]:
    """The items, made by another thread, at most `count` of them in advance.

    An exception in the thread is raised in place of its item. Closing this generator closes `items` too, in
    that thread, once the current item is made.
    """
    end = object()
    coming = iter(items)
    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        try:
            waiting.extend(thread.submit(next, coming, end) for _ in range(count))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, coming, end))
                yield item  # type: ignore[misc]
                del item
        finally:
            for future in waiting:
                future.cancel()
            if isinstance(coming, Generator):
                thread.submit(coming.close)


def split(items: Iterable[Item], readers: int) -> list[Iterator[Item]]:
    """The same items for several readers. Items are kept until the last reader has read them, so readers
    should stay close together. Readers may be in different threads, and each gets an error of the items.

    itertools.tee would keep up to 57 items that all have read: gigabytes of 8K frames.
    """
    coming = iter(items)
    waiting: list[deque[Item]] = [deque() for _ in range(readers)]
    lock = Lock()
    errors: list[BaseException] = []

    def more(mine: deque[Item]) -> bool:
        """Whether `mine` has an item. Takes the next one from the source if necessary."""
        with lock:
            if mine:
                return True
            if errors:
                raise errors[0]
            try:
                item = next(coming)
            except StopIteration:
                return False
            except BaseException as error:
                errors.append(error)
                raise
            for queue in waiting:
                queue.append(item)
            return True

    def read(mine: deque[Item]) -> Iterator[Item]:
        while more(mine):
            yield mine.popleft()

    return [read(queue) for queue in waiting]


def counted(items: Iterable[Item], count: int, stage: str, progress: Progress) -> Iterator[Item]:
    """The items, with about REPORTS reports of progress."""
    step = max(1, -(-count // REPORTS))
    for k, item in enumerate(items):
        if k % step == 0:
            progress(StageProgress(stage, k + 1, count))
        yield item
