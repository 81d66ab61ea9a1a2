"""An executor that forwards every call to another. Watching executors are subclasses."""

from collections.abc import Mapping, Sequence

from trt_wan.engines.contract import Network
from trt_wan.runtime.executors import Array, Executor


class ForwardingExecutor:
    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        return self.executor.run(network, n, inputs)

    def place(self, array: Array) -> Array:
        return self.executor.place(array)

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        return self.executor.combine(terms)

    def wait(self) -> None:
        self.executor.wait()

    def settle(self) -> None:
        self.executor.settle()

    def release(self, names: set[str]) -> None:
        self.executor.release(names)
