"""Seeded random weights of sane magnitude for any model: numerics and speed can be shown with them, pictures
cannot.

Every parameter is random, also those that a fresh module would leave at 0 or 1 (biases, norm weights), so
that a test notices a term that was forgotten.
"""

import math

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part

_EMBEDDINGS = (
    "shared.weight",
    "class_embedding",
    "position_embedding.weight",
    "relative_attention_bias.weight",
)


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """A tensor whose scale follows from its name, so that activations stay near unit variance."""
    values = rng.standard_normal(shape, dtype=np.float32)
    last = name.rsplit(".", 1)[-1]
    if name.endswith(_EMBEDDINGS):
        return values
    if last == "gamma" or (last == "weight" and len(shape) == 1):  # a norm
        return 1 + np.float32(0.1) * values
    if last in ("bias", "padding_tokens"):
        return np.float32(0.1) * values
    if last == "modulation":
        return values / np.float32(math.sqrt(shape[-1]))
    if name.startswith("motion_encoder."):  # the graph divides by the root of the fan-in itself
        return values
    return values / np.float32(math.sqrt(math.prod(shape[1:])))


def random_weights(model: ModelConfig, part: Part, seed: int) -> dict[str, NDArray[np.float32]]:
    """All tensors of `part` by canonical name; the same for the same seed on every machine."""
    rng = np.random.default_rng([seed, PARTS.index(part)])
    return {name: random_tensor(name, shape, rng) for name, shape in required_tensors(model, part).items()}
