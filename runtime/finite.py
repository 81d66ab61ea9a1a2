"""Finds the network, and the weight, behind a NaN or an infinity.

A run checks the latent after every step, and every piece of decoded frames (four at 832x480 take 2 ms of the
host). When one is not finite, the step is computed again by a `Watching` executor, which checks every
network's inputs and outputs and raises NotFinite with the first one's name.
"""

from collections.abc import Callable, Mapping

import numpy as np

from trt_wan.engines.contract import Network, Part, Tensor
from trt_wan.errors import NotFinite
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.weights.checkpoint import Checkpoint

Replay = Callable[[Model], object]  # computes again, from host arrays, a result that was not finite


class Broken(Exception):
    """A result is not finite. `replay` computes it again; it holds no arrays of a GPU."""

    def __init__(self, when: str, replay: Replay) -> None:
        super().__init__(when)
        self.when, self.replay = when, replay


def is_finite(array: Array) -> bool:
    return bool(np.isfinite(np.asarray(array)).all())


def is_finite_sum(array: Array) -> bool:
    """`is_finite` of numbers that are far from the largest float32, in a third of the time."""
    return bool(np.isfinite(np.add.reduce(array, axis=None)))


def explained(model: Model, broken: Broken) -> NotFinite:
    """The error for the user, with the network's name if computing again shows it."""
    try:
        with model.executed_by(lambda executor: Watching(executor, model.weights)):
            broken.replay(model)
    except NotFinite as error:
        return NotFinite(f"{error.message.removesuffix('.')} ({broken.when}).", error.hint)
    return NotFinite(
        f"The result is not a number ({broken.when}); computed again, it is one.",
        "The GPU may be faulty: run again, and please report it if it happens again.",
    )


class Watching(ForwardingExecutor):
    """Raises NotFinite at the first network that is given or gives a NaN or an infinity. Waits for each."""

    def __init__(self, executor: Executor, weights: Mapping[Part, Mapping[str, Array]]) -> None:
        super().__init__(executor)
        self._weights = weights

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        layer = f"{network.name} {n}" if network.repeats > 1 else network.name
        for name, array in inputs.items():
            if not self.executor.is_finite(array):
                raise NotFinite(f"{layer} is given a NaN or an infinity as {name}.", _REPORT)
        outputs = self.executor.run(network, n, inputs)
        for tensor, array in zip(network.outputs, outputs, strict=True):
            if not self.executor.is_finite(array):
                raise self._fault(network, n, layer, tensor)
        return outputs

    def _fault(self, network: Network, n: int, layer: str, output: Tensor) -> NotFinite:
        message = f"{layer} gives a NaN or an infinity as {output.name}"
        tensors = self._weights[network.part]
        for weight in network.weights:
            key = network.weight_key(weight.name, n)
            if key in tensors and not is_finite(
                tensors[key]
            ):  # scales that the loader computes are in no file
                file = tensors.path if isinstance(tensors, Checkpoint) else network.part
                return NotFinite(f"{message}: the tensor {key} of {file} holds one.", DAMAGED)
        return NotFinite(f"{message}; its weights and inputs are finite.", _REPORT)


DAMAGED = "Download or convert that checkpoint again."
_REPORT = (
    "Try --tier exact and --precision bf16. If that does not help, please report the command and the GPU."
)
