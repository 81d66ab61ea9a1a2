"""What a network is called and what goes in and out of it: the one text that build and runtime both read.

A network's weights are inputs of its graph like any other; their names are the checkpoint's own (official Wan
names, model_spec.md 1.3) with `scope` in front: the weight `self_attn.q.weight` of `attn_in` for block 7 is
`blocks.7.self_attn.q.weight`. Linear weights are stored [out, in]. Shapes are static and have no batch axis.
"""

from dataclasses import dataclass
from typing import Literal

Part = Literal["transformer", "vae", "text_encoder", "image_encoder"]
DType = Literal["float32", "int64"]


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: DType = "float32"


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

    def weight_key(self, name: str, n: int = 0) -> str:
        """The name in the checkpoint of weight `name` of the `n`-th set."""
        assert 0 <= n < self.repeats, f"{self.name} has {self.repeats} sets of weights, asked for {n}"
        return self.scope.format(n=n) + name


def linear(name: str, out: int, inner: int) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a linear layer."""
    return Tensor(f"{name}.weight", (out, inner)), Tensor(f"{name}.bias", (out,))
