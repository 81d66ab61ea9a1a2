"""Ranks of one process, a thread each, joined by the same sockets and memory as processes are."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.connection import Pipe
from typing import Any, TypeVar

from trt_wan.runtime.parallel.ranks import HALF, Links, Ranks

Made = TypeVar("Made")


@contextmanager
def connected(count: int, seconds: float = 60.0) -> Iterator[list[Ranks]]:
    """All ranks of a model."""
    if count == 1:
        yield [Ranks()]
        return
    pairs = {(i, j): Pipe() for j in range(count) for i in range(j)}
    memories = [os.memfd_create(f"rank {rank}") for rank in range(count)]
    for memory in memories:
        os.truncate(memory, 2 * HALF)
    made = []
    for rank in range(count):
        others = [other for other in range(count) if other != rank]
        sockets: Any = {other: pairs[min(rank, other), max(rank, other)][rank > other] for other in others}
        made.append(Ranks(rank, count, Links(sockets, memories), seconds))
    for memory in memories:
        os.close(memory)
    try:
        yield made
    finally:
        for ranks in made:
            ranks.close()


def at_once(functions: Sequence[Callable[[], Made]]) -> list[Made]:
    """The results of functions that wait for each other, each in a thread of its own. Raises the first error
    of the first of them that failed.
    """
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
        wait(futures)
        return [future.result() for future in futures]
