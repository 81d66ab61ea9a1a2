"""Inputs to measure a network with: seeded, and as awkward as those of a trained model.

In trained transformers a few channels of the residual stream are tens of times larger than the rest, and a
few channels of k have a large mean that all tokens share. 8-bit formats suffer from both, and plain
Gaussian noise has neither. Weights are Gaussian: only their rounding matters.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines import fp8, int8
from trt_wan.engines.contract import QUANTISED, Network, scale_name

Host = NDArray[Any]
Float = NDArray[np.float32]

WEIGHT_GAIN = 1.4  # deviation times the root of the inputs: 0.02 for the 14B's 5120
RESIDUAL_FACTORS = (20, 30, 40, 50)  # outlier channels of the residual stream
K_MEANS = (9, -9, 12, -6)  # outlier channels of k; deviations are 1
Q_FACTOR = 2  # q in k's outlier channels; more makes FP8 attention saturate (FP8_ATTENTION_RANGE)
V_FACTOR = 8  # one channel of v
NUMBERS = {"nag_scale": 11.0, "nag_tau": 2.5, "nag_alpha": 0.25, "keep": 0.5}  # as people use them


def realistic(network: Network, seed: int) -> dict[str, Host]:
    """Every input and weight of `network` (at its precision) by name, in the contract's types."""
    rng = np.random.default_rng(seed)
    types = {t.name: np.dtype(t.dtype) for t in network.inputs + network.weights}
    made: dict[str, Host] = {}
    for tensor in network.inputs + network.weights:
        if tensor.name in made:  # a scale came with its weight, a sine with its cosine
            continue
        if tensor.name == "rope_cos":
            angles = rng.uniform(0, 2 * np.pi, tensor.shape)
            made |= {"rope_cos": np.cos(angles), "rope_sin": np.sin(angles)}
            continue
        if tensor.name == "cross_q":  # like q, in every head; its keys know the heads' size
            head_dim = next(t.shape[-1] for t in network.inputs if t.name == "text_k")
            values = _values("q", (tensor.shape[0], tensor.shape[1] // head_dim, head_dim), rng)
            made[tensor.name] = values.reshape(tensor.shape)
            continue
        values = _values(tensor.name, tensor.shape, rng)
        if tensor.name.endswith("SelfAttention.q.weight"):  # T5 has no softmax scale: its q learned it
            heads = next(t.shape[1] for t in network.weights if t.name.endswith("attention_bias.weight"))
            values *= (tensor.shape[0] // heads) ** -0.5
        if tensor.dtype in QUANTISED:
            quantise = {"int8": int8.quantise_rows, "float8_e4m3fn": fp8.quantise_rows}[tensor.dtype]
            made[tensor.name], made[scale_name(tensor.name)] = quantise(values)
        else:
            made[tensor.name] = values
    return {name: values.astype(types[name], copy=False) for name, values in made.items()}


def dequantised(name: str, values: dict[str, Host]) -> Float:
    """The float32 numbers that the tensor `name` stands for."""
    kind, tensor = values[name].dtype.name, values[name].astype(np.float32)
    if kind not in QUANTISED:
        return tensor
    tensor *= values[scale_name(name)][:, None]
    return int8.rotated(tensor) if kind == "int8" else tensor


def outlier_channels(size: int, count: int) -> NDArray[np.int64]:
    """The same in every head, spread evenly."""
    return np.arange(count) * size // count + size // (2 * count)


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Float:
    noise = rng.standard_normal(shape, np.float32)
    size = shape[-1]
    if name == "x":
        noise[:, outlier_channels(size, len(RESIDUAL_FACTORS))] *= RESIDUAL_FACTORS
    elif name == "q":
        noise[..., outlier_channels(size, len(K_MEANS))] *= Q_FACTOR
        noise *= size**-0.5  # q comes multiplied by the softmax scale
    elif name == "k" or name.endswith("_k"):
        noise[..., outlier_channels(size, len(K_MEANS))] += K_MEANS
    elif name == "v":
        noise[..., outlier_channels(size, 1)] *= V_FACTOR
    elif name in ("attended", "cross_attended"):  # an average of v, so smaller
        noise[:, outlier_channels(size, len(K_MEANS))] *= V_FACTOR
        noise *= 0.3
    elif name == "time_modulation":
        noise *= 0.3
    elif name in NUMBERS:
        noise = np.full(shape, NUMBERS[name], np.float32)
    else:
        mean, deviation = moments(name, shape)
        noise = np.float32(mean) + np.float32(deviation) * noise
    return noise


def moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of the tensor `name`, if it has no outliers."""
    if name in ("modulation", "bias") or name.endswith(".bias"):
        return 0.0, 0.1
    if len(shape) == 1 or name.endswith(".gamma"):  # a norm's weight
        return 1.0, 0.1
    if name.endswith(".weight"):
        return 0.0, WEIGHT_GAIN * math.prod(shape[1:]) ** -0.5  # also convolutions
    return 0.0, 1.0
