"""The processes of one model, a rank each, and their exchange through the host.

All ranks compute the same job in step (one program, many processes), so every rank calls these functions in
the same order. Arrays go through memory that all ranks have mapped, the rest through sockets. A rank that
ends closes its sockets, and a rank that waits for it gets RankLost at once.
"""

import math
import mmap
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from trt_wan.errors import GpuFault
from trt_wan.runtime.executors import Array

# The cost of a result beside the others, and the function that computes it. Cost TOGETHER: all ranks compute
# it in step, and all have the result.
Task = tuple[float, Callable[[], Array]]
TOGETHER = math.inf

HALF = 8 << 30  # bytes of a rank's memory for one exchange; pages that no exchange has needed take none
ALIGNMENT = 64  # bytes
SECONDS = 900.0  # to wait for a rank that lives: others may build engines meanwhile


class RankLost(GpuFault):
    """Another process of the model has ended, or does not answer."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(
            f"The process of GPU {rank} {why}, so the job cannot go on.",
            "Start it again; without --gpus one GPU computes it alone.",
        )
        self.rank = rank


@dataclass(frozen=True)
class Links:
    """Sockets to the other ranks, by rank, and a file descriptor of every rank's memory."""

    sockets: Mapping[int, Connection]
    memories: Sequence[int]


class Ranks:
    """Rank `rank` of `count`. Without links there is one rank. `seconds` is the longest wait for a rank that
    lives, None for any time.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, links: Links | None = None, seconds: float | None = SECONDS
    ) -> None:
        assert (count > 1) == (links is not None), "links connect several ranks"
        self.rank, self.count, self._seconds = rank, count, seconds
        self._sockets = dict(links.sockets) if links else {}
        self._memories = [mmap.mmap(fd, 2 * HALF) for fd in links.memories] if links else []
        self._turn = 0
        self.watch: Callable[[str, float], object] = lambda name, seconds: None  # told of own tasks

    def exchange(self, payload: bytes) -> list[bytes]:
        """The payloads of all ranks, by rank: a few KB each. Raises RankLost."""
        for rank, socket in self._sockets.items():
            try:
                socket.send_bytes(payload)
            except OSError:
                raise RankLost(rank, "has ended") from None
        given = {rank: self._received(rank, socket) for rank, socket in self._sockets.items()}
        given[self.rank] = payload
        return [given[rank] for rank in range(self.count)]

    def gather(self, arrays: Sequence[Array]) -> list[list[Array]]:
        """The arrays that every rank has given, by rank. Those of others are views that are valid until the
        next call, which may be given them; copy what stays. Raises RankLost.
        """
        if self.count == 1:
            return [list(arrays)]
        end = self._turn * HALF
        self._turn = 1 - self._turn
        written = []
        for array in arrays:
            start, end = end, end + -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            assert end <= (start // HALF + 1) * HALF, f"{array.nbytes} bytes more than an exchange may have"
            written.append((start, array.shape, array.dtype.str))
            self._view(self.rank, *written[-1])[...] = array
        headers = map(pickle.loads, self.exchange(pickle.dumps(written)))
        return [
            list(arrays) if rank == self.rank else [self._view(rank, *place) for place in header]
            for rank, header in enumerate(headers)
        ]

    def divide(self, tasks: Sequence[Task]) -> list[Array]:
        """The results of all tasks, in order, on the host of every rank. Each is computed by one rank, or
        by all together; these come first.
        """
        if self.count == 1:
            return [self._made(make) for _, make in tasks]
        together = {i: self._made(make) for i, (cost, make) in enumerate(tasks) if cost == TOGETHER}
        apart = [i for i in range(len(tasks)) if i not in together]
        owners = shared_out([tasks[i][0] for i in apart], self.count)
        own = [self._made(tasks[i][1]) for i, owner in zip(apart, owners, strict=True) if owner == self.rank]
        made = [iter(arrays) for arrays in self.gather(own)] if apart else []
        results = together | {i: np.array(next(made[owner])) for i, owner in zip(apart, owners, strict=True)}
        return [results[i] for i in range(len(tasks))]

    def _made(self, make: Callable[[], Array]) -> Array:
        start = time.perf_counter()
        made = make() if self.count == 1 else np.asarray(make())
        function = getattr(make, "func", make)  # a partial's function
        self.watch(getattr(function, "__name__", "task"), time.perf_counter() - start)
        return made

    def of_first(self, arrays: Sequence[Array]) -> list[Array]:
        """The arrays of rank 0, on the host of every rank. The others' count for nothing."""
        if self.count == 1:
            return list(arrays)
        first = self.gather(arrays if self.rank == 0 else ())[0]
        return [np.array(array) for array in first]

    def all_have(self, having: Sequence[bool]) -> list[bool]:
        """By place, whether it is True on every rank."""
        return [all(column) for column in zip(*self.exchange(bytes(having)), strict=True)]

    def least(self, value: int) -> int:
        """The least of the values of all ranks."""
        return min(int(given) for given in self.exchange(str(value).encode()))

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close()

    def _view(self, rank: int, start: int, shape: Sequence[int], dtype: str) -> Array:
        memory = self._memories[rank]
        count = math.prod(shape)
        return np.frombuffer(memory, np.dtype(dtype), count, start).reshape(shape)

    def _received(self, rank: int, socket: Connection) -> bytes:
        try:
            if not socket.poll(self._seconds):
                raise RankLost(rank, f"has not answered for {self._seconds:g} s")
            return socket.recv_bytes()
        except (EOFError, OSError):
            raise RankLost(rank, "has ended") from None


def shared_out(costs: Sequence[float], count: int) -> list[int]:
    """For each task the rank that computes it: the largest first, each by the rank that has least to do."""
    loads, owners = [0.0] * count, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = loads.index(min(loads))
        loads[owners[task]] += costs[task]
    return owners
