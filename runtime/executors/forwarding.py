"""An executor that forwards every call to another. Watching executors are subclasses."""

from collections.abc import Callable, Mapping, Sequence

from trt_wan.engines.contract import Network
from trt_wan.runtime.executors import Array, BlendPart, Executor


class ForwardingExecutor:
    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        return self.executor.run(network, n, inputs)

    def place(self, array: Array) -> Array:
        return self.executor.place(array)

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        return self.executor.combine(terms)

    def dot(self, x: Array, y: Array) -> float:
        return self.executor.dot(x, y)

    def take(self, array: Array, slots: Sequence[int]) -> Array:
        return self.executor.take(array, slots)

    def join(self, arrays: Sequence[Array]) -> Array:
        return self.executor.join(arrays)

    def blend(self, slots: int, parts: Sequence[BlendPart], onto: Array | None = None) -> Array:
        return self.executor.blend(slots, parts, onto)

    def put_rows(self, onto: Array, array: Array, start: int, stop: int) -> Array:
        return self.executor.put_rows(onto, array, start, stop)

    def is_finite(self, array: Array) -> bool:
        return self.executor.is_finite(array)

    def fetch(self, array: Array) -> Callable[[], Array]:
        return self.executor.fetch(array)

    def wait(self) -> None:
        self.executor.wait()

    def settle(self) -> None:
        self.executor.settle()

    def release(self, names: set[str]) -> None:
        self.executor.release(names)
