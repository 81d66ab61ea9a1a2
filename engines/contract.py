"""The contract of a network: its name, inputs, weights and outputs. Both build and runtime read it.

A network's weights are inputs of its graph like any other; their names are the checkpoint's own (official Wan
names, model_spec.md 1.3) with `scope` in front: the weight `self_attn.q.weight` of `attn_in` for block 7 is
`blocks.7.self_attn.q.weight`. Linear weights are stored [out, in]. Shapes are static and have no batch axis.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from trt_wan.engines.precision import PRECISIONS, Precision

Part = Literal[
    "transformer",
    "vae",
    "text_encoder",
    "image_encoder",
    "camera_control",
    "sam2",
    "lynx_resampler",
    "lynx_ip",
    "lynx_ref",
]
DType = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "int64"]
QUANTISED = ("float8_e4m3fn", "int8")  # weights of these types have a scale per row
# A contract names the role of a tensor whose type the precision decides: see `at_precision`.
Role = Literal["activation", "linear"]


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: DType | Role = "float32"


@dataclass(frozen=True)
class Network:
    """One graph. `repeats` sets of weights run through it; `{n}` in `scope` is the set's number."""

    name: str
    part: Part
    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    scope: str = ""
    repeats: int = 1
    quantised: bool = False  # whether its linear weights have 8 bits where the precision has
    optional: bool = False  # exported and built with the others, opened for jobs that run it

    def weight_key(self, name: str, n: int = 0) -> str:
        """The name in the checkpoint of weight `name` of the `n`-th set."""
        assert 0 <= n < self.repeats, f"{self.name} has {self.repeats} sets of weights, asked for {n}"
        return self.scope.format(n=n) + name

    def keys(self, n: int) -> set[str]:
        """The names in the checkpoint of all weights of the `n`-th set."""
        return {self.weight_key(weight.name, n) for weight in self.weights}


def linear(name: str, out: int, inner: int) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a linear layer."""
    return Tensor(f"{name}.weight", (out, inner), "linear"), Tensor(f"{name}.bias", (out,))


def exact_linear(name: str, out: int, inner: int) -> tuple[Tensor, Tensor]:
    """A linear layer that stays in float32 at every precision."""
    return Tensor(f"{name}.weight", (out, inner)), Tensor(f"{name}.bias", (out,))


def at_precision(network: Network, precision: Precision) -> Network:
    """`network` with a type for every tensor. A weight `x.weight` of 8 bits is followed by its scale
    `x.scale`, one float32 per output channel (all the same for a checkpoint with one scale per tensor).
    """
    row = PRECISIONS[precision]
    linear_type = (network.quantised and row.quantised) or row.linear

    def typed(tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
        for tensor in tensors:
            if tensor.dtype == "activation":
                yield replace(tensor, dtype=row.activation)
            elif tensor.dtype == "linear":
                yield replace(tensor, dtype=linear_type)
                if linear_type in QUANTISED:
                    yield Tensor(scale_name(tensor.name), tensor.shape[:1])
            else:
                yield tensor

    return replace(
        network,
        inputs=tuple(typed(network.inputs)),
        weights=tuple(typed(network.weights)),
        outputs=tuple(typed(network.outputs)),
    )


def scale_name(weight: str) -> str:
    """The name of the scale of a weight of 8 bits."""
    return weight.removesuffix("weight") + "scale"
