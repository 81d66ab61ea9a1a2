"""The VAE's graph functions run by torch as they are, and random weights for them."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from trt_wan.build.models import GRAPHS
from trt_wan.engines.config import TINY, ModelConfig
from trt_wan.engines.contract import Network, Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor


class EagerExecutor(OnnxRuntimeExecutor):
    """Runs the graph functions themselves, without an export: seconds less per chunk size."""

    def __init__(self, config: ModelConfig, plan: Plan, weights: Mapping[Part, Mapping[str, Array]]) -> None:
        super().__init__(Path(), BoundWeights(weights))
        self.config, self.plan = config, plan

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        def tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
            return {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}

        given, weights = tensors(inputs), tensors(self.weights.bind(network, n))
        with torch.no_grad():
            outputs = GRAPHS[network.name](*given.values(), w=weights, model=self.config, plan=self.plan)
        for contract, output in zip(network.outputs, outputs, strict=True):
            assert contract.shape == tuple(output.shape), contract.name
        return tuple(output.numpy() for output in outputs)


def vae_networks(config: ModelConfig, plan: Plan) -> tuple[Network, ...]:
    return tuple(network for network in networks(config, plan).values() if network.part == "vae")


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    parts = vae_networks(config, Plan())
    return {n.weight_key(w.name): w.shape for n in parts for w in n.weights}


def random_weights(config: ModelConfig = TINY) -> dict[str, Array]:
    """Random everywhere, gammas around 1, convolutions scaled to keep the variance."""
    rng = np.random.default_rng(7)

    def random(name: str, shape: tuple[int, ...]) -> Array:
        values = rng.standard_normal(shape)
        if name.endswith("gamma"):
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values = 0.1 * values
        else:
            values = values / math.sqrt(math.prod(shape[1:]))
        return values.astype(np.float32)

    return {name: random(name, shape) for name, shape in weight_shapes(config).items()}
