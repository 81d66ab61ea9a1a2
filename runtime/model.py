"""A model ready to run: contracts, weights and an executor, called by network name.

    (q, k, v) = model.run("attn_in", x, time_modulation, cos, sin, n=7)

Inputs go in the contract's order, `n` says which set of weights (which block). Weights are read once and
kept.
"""

from collections.abc import Mapping

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.plan import Plan
from trt_wan.runtime.executors import Array, Executor


class Model:
    def __init__(
        self, config: ModelConfig, plan: Plan, executor: Executor, weights: Mapping[Part, Mapping[str, Array]]
    ) -> None:
        self.config, self.plan, self.executor, self.weights = config, plan, executor, weights
        self.networks = networks(config, plan)
        self._bound: dict[tuple[str, int], dict[str, Array]] = {}

    def run(self, name: str, *inputs: Array, n: int = 0) -> tuple[Array, ...]:
        network = self.networks[name]
        assert len(inputs) == len(network.inputs), (
            f"{name} takes {len(network.inputs)} inputs, got {len(inputs)}"
        )
        tensors = dict(self._weights_of(network, n))
        for contract, value in zip(network.inputs, inputs, strict=True):
            assert value.shape == contract.shape, (
                f"{name}.{contract.name} is {contract.shape}, got {value.shape}"
            )
            tensors[contract.name] = value
        return self.executor.run(network, tensors)

    def release(self, part: Part) -> None:
        """Forgets the weights of a part that has done its work; used again, they are read again."""
        self._bound = {key: value for key, value in self._bound.items() if self.networks[key[0]].part != part}

    def _weights_of(self, network: Network, n: int) -> dict[str, Array]:
        key = (network.name, n)
        if key not in self._bound:
            stored = self.weights[network.part]
            self._bound[key] = {w.name: stored[network.weight_key(w.name, n)] for w in network.weights}
        return self._bound[key]
