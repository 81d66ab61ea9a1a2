"""A model ready to run: contracts and an executor, called by network name.

    (q, k, v) = model.run("attn_in", x, time_modulation, cos, sin, n=7)

Inputs go in the contract's order, `n` says which set of weights (which block). Arrays are whatever the
executor works on; numpy arrays always do, and `np.asarray` of a result brings it to the host.
"""

from collections.abc import Mapping

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array, Executor


class Model:
    """`weights` are those that the host itself reads: umT5's token embedding and final norm."""

    def __init__(
        self, config: ModelConfig, plan: Plan, executor: Executor, weights: Mapping[Part, Mapping[str, Array]]
    ) -> None:
        self.config, self.plan, self.executor, self.weights = config, plan, executor, weights
        self.networks = networks(config, plan)

    def run(self, name: str, *inputs: Array, n: int = 0) -> tuple[Array, ...]:
        network = self.networks[name]
        assert len(inputs) == len(network.inputs), (
            f"{name} takes {len(network.inputs)} inputs, got {len(inputs)}"
        )
        named = {}
        for contract, value in zip(network.inputs, inputs, strict=True):
            assert tuple(value.shape) == contract.shape, (
                f"{name}.{contract.name} is {contract.shape}, got {value.shape}"
            )
            named[contract.name] = value
        return self.executor.run(network, n, named)

    def place(self, array: Array) -> Array:
        """`array` where the executor wants its inputs, for one that goes in many times."""
        return self.executor.place(array)

    def release(self, *names: str) -> None:
        """Says that these networks have done their work; used again, their weights are read again."""
        self.executor.release(set(names))
