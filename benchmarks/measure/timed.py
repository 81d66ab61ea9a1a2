"""An executor that counts the calls of another, and times them by network while `watching` is set.

On a GPU times come from CUDA events on the compute stream, so nothing waits. Elsewhere they are the host's.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from trt_wan.engines.contract import Network
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor

SAMPLER = "sampler"  # the arithmetic between two steps, beside the networks' names


class Clock(Protocol):
    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """For executors that return when a call is done."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class TimedExecutor(ForwardingExecutor):
    """`calls` and `uploads` (host arrays handed in) always count."""

    def __init__(self, executor: Executor, clock: Clock) -> None:
        super().__init__(executor)
        self.clock = clock
        self.watching = False
        self.stage = ""
        self.calls: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self._marks: list[tuple[str, str, Any, Any]] = []

    def start_watching(self) -> None:
        """Times all calls from now on. Counts start again."""
        self.watching = True
        self.calls.clear()
        self.uploads.clear()

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        self.calls[network.name] += 1
        self.uploads[network.name] += sum(isinstance(value, np.ndarray) for value in inputs.values())
        start = self.clock.mark() if self.watching else None
        outputs = self.executor.run(network, n, inputs)
        if start is not None:
            self._marks.append((self.stage, network.name, start, self.clock.mark()))
        return outputs

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        self.calls[SAMPLER] += 1
        start = self.clock.mark() if self.watching else None
        result = self.executor.combine(terms)
        if start is not None:
            self._marks.append((self.stage, SAMPLER, start, self.clock.mark()))
        return result

    def watched(self) -> dict[tuple[str, str], list[float]]:
        """Returns and forgets the seconds of every timed call, by stage and network, in order."""
        self.wait()
        found = defaultdict(list)
        for stage, name, start, end in self._marks:
            found[stage, name].append(self.clock.seconds(start, end))
        self._marks = []
        return dict(found)


def timed(executor: Executor) -> TimedExecutor:
    """Returns `executor` in a watch with the right clock."""
    from trt_wan.runtime.executors.gpu import GpuExecutor

    if isinstance(executor, GpuExecutor):
        from trt_wan.benchmarks.machine.gpu_events import GpuEvents

        return TimedExecutor(executor, GpuEvents(executor.gpu))
    return TimedExecutor(executor, HostClock())
