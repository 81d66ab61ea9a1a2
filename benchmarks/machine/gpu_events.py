"""Times on the GPU by CUDA events, without torch. Event pairs on a starved stream time the host, so callers
must enqueue enough work between them.
"""

from collections.abc import Callable
from typing import Any

from trt_wan.runtime.device.gpu import Gpu


class GpuEvents:
    """Marks on the compute stream of a `Gpu`."""

    def __init__(self, gpu: Gpu) -> None:
        from cuda.bindings import runtime

        self._gpu, self._runtime = gpu, runtime

    def mark(self) -> Any:
        error, event = self._runtime.cudaEventCreate()
        assert not error, error
        (error,) = self._runtime.cudaEventRecord(event, self._gpu.handle)
        assert not error, error
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Returns the seconds between two reached marks and frees both."""
        error, milliseconds = self._runtime.cudaEventElapsedTime(start, end)
        assert not error, error
        for event in (start, end):
            self._runtime.cudaEventDestroy(event)
        return float(milliseconds) / 1e3

    def timed(self, enqueue: Callable[[], object], warm_up: int = 3, count: int = 10) -> list[float]:
        """Returns the seconds of each of `count` calls, enqueued back to back."""
        for _ in range(warm_up):
            enqueue()
        marks = []
        for _ in range(count):
            start = self.mark()
            enqueue()
            marks.append((start, self.mark()))
        self._gpu.sync()
        return [self.seconds(*pair) for pair in marks]
