"""What a TensorRT-RTX engine will run, read from the text inside its plan. For tests only: the text is
undocumented, and the official inspector needs a GPU.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Kernel(NamedTuple):
    kind: str  # fully_connected is a GEMM, runtime_fusion one with more, corrltn a convolution
    name: str
    inputs: tuple[str, ...]  # types, such as bf16
    outputs: tuple[str, ...]


def kernels(plan: bytes) -> Iterator[Kernel]:
    """Of all programs in the plan: the first is what runs, others are the insides of its runtime fusions."""
    for text in re.findall(rb"header \{\n[^\0]*", plan):
        header, found, body = text.decode("latin1").partition("main {")
        types = dict(re.findall(r'tensor=\{[^\n]*? name="([^"]*)"[^\n]* type=(\w+) \}', header))
        for line in body.partition("shape_main {")[0].splitlines() if found else ():
            if match := re.match(r' +(\w+)=\{ name="?([^" ]*)', line):
                yield Kernel(*match.groups(), *(_types(line, side, types) for side in ("input", "output")))


def gemms(plan: bytes) -> list[tuple[str, str, str]]:
    """The types of left operand, right operand and result of every matrix product of a linear layer."""
    products = (k for k in kernels(plan) if k.kind == "fully_connected")
    return [(k.inputs[0], k.inputs[1], k.outputs[0]) for k in products]


def fused_attentions(plan: bytes) -> list[tuple[str, ...]]:
    """The types of q, k, v of every attention that is one kernel."""
    return [k.inputs[:3] for k in kernels(plan) if "mha" in k.name]


def _types(line: str, side: str, types: dict[str, str]) -> tuple[str, ...]:
    names = re.findall(rf" {side}(?:_args|s)?=\{{([^}}]*)\}}", line)
    return tuple(types[name] for name in re.findall(r'"([^"]*)"', " ".join(names)))
