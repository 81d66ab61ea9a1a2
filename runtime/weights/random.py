"""Seeded random weights of sane magnitude for any model: numerics and speed can be shown with them, pictures
cannot.

Every parameter is random, also those that a fresh module would leave at 0 or 1 (biases, norm weights), so
that a test notices a term that was forgotten.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import DIRECTION, OPTIONAL_PARTS, ORTHONORMAL, PARTS, required_tensors
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.lynx import Kind
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.stored import Stored

_EMBEDDINGS = (
    "shared.weight",
    "class_embedding",
    "position_embedding.weight",
    "relative_attention_bias.weight",
)


def random_moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation for a tensor, from its name: activations stay near unit variance."""
    last = name.rsplit(".", 1)[-1]
    if name.endswith(_EMBEDDINGS):
        return 0.0, 1.0
    if last == "gamma" or (last == "weight" and len(shape) == 1):  # a norm
        return 1.0, 0.1
    if last in ("bias", "padding_tokens"):
        return 0.0, 0.1
    if last in ("modulation", "orthonormal"):
        return 0.0, 1 / math.sqrt(max(shape))
    if name.startswith("motion_encoder."):  # the graph divides by the root of the fan-in itself
        return 0.0, 1.0
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    mean, deviation = random_moments(name, shape)
    return np.float32(mean) + np.float32(deviation) * rng.standard_normal(shape, dtype=np.float32)


def random_weights(
    model: ModelConfig, part: Part, seed: int, kind: Kind = "full"
) -> dict[str, NDArray[np.float32]]:
    """All tensors of `part` by canonical name; the same for the same seed on every machine. `kind` is that of
    Lynx's adapter.
    """
    rng = np.random.default_rng([seed, (*PARTS, *OPTIONAL_PARTS).index(part)])
    shapes = required_tensors(model, part, kind)
    return {name: random_tensor(name, shapes[name], rng) for name in _drawing_order(list(shapes))}


def _drawing_order(names: list[str]) -> list[str]:
    """A seed keeps its numbers: the second half of a block was one network when they were first drawn."""
    first = "blocks.0.self_attn.o.weight"
    if first not in names:
        return names
    start, stop = (
        names.index(first),
        1 + max(i for i, name in enumerate(names) if name.endswith(".ffn.2.bias")),
    )
    half = sorted(names[start:stop], key=lambda name: int(name.split(".")[1]))
    return names[:start] + half + names[stop:]


class RandomWeights(Mapping[str, NDArray[np.float32]]):
    """The tensors of `part`, each made when asked for: a full-size model takes no memory until it is used."""

    def __init__(self, model: ModelConfig, part: Part, seed: int) -> None:
        self.shapes = required_tensors(model, part)
        self.seed = seed

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name == ORTHONORMAL:
            return orthonormal(self[DIRECTION])
        return random_tensor(name, self.shapes[name], self._rng(name))

    def stored(self, name: str) -> Stored:
        return Stored(self[name])

    def rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        """Rows of a table, each with a seed of its own."""
        inner = self.shapes[name][1:]
        return np.stack([random_tensor(name, (1, *inner), self._rng(f"{name} {i}"))[0] for i in indices])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])
