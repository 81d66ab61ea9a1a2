"""How the numbers of a file are stored, as one name, and what that costs.

ERRORS is what a type costs by itself: the largest |difference| from the float32 original, as a share of the
largest |W|, measured on the tiny model (files_and_loras.md 1; GGUF and int8: tests/test_layouts.py).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.stored import FP8_TYPES
from trt_wan.runtime.weights.tensor_file import Entry

ERRORS = {
    "F64": 0.0,
    "F32": 0.0,
    "F16": 4.5e-4,
    "BF16": 3.5e-3,
    "scaled F8_E4M3": 3.6e-2,
    "F8_E4M3": 5.8e-2,
    "scaled F8_E5M2": 7.1e-2,
    "F8_E5M2": 1.1e-1,
    "int8 ConvRot": 7e-3,
    "int8": 8e-3,
    "Q8_0": 4e-3,
    "Q6_K": 2e-2,
    "Q5_1": 3e-2,
    "Q5_K": 3e-2,
    "Q5_0": 4e-2,
    "Q4_1": 6e-2,
    "Q4_K": 6e-2,
    "Q4_0": 8e-2,
    "Q3_K": 1.5e-1,
    "Q2_K": 3e-1,
}
ENGINE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "scaled F8_E4M3"}
DIGITS = 4  # of a cost; files that differ by less compete


@dataclass(frozen=True)
class Cost:
    """Files are taken in this order, the smallest first. Equal costs compete."""

    error: float  # mean over the numbers, after loading
    bits: float  # per number: of two that cost the same error the shorter one is read faster
    age: int  # 0: the newest layout


def encoding_of(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """The type in which most numbers of the tensors `names` are stored, such as "scaled F8_E4M3"."""
    sizes: Counter[str] = Counter()
    for name in names:
        sizes[type_of(checkpoint, name)] += math.prod(checkpoint.shape(name))
    return sizes.most_common(1)[0][0] if sizes else ""


def type_of(checkpoint: Checkpoint, name: str) -> str:
    """A key of ERRORS, or the type's own name."""
    entry, stored = checkpoint.entry(name), checkpoint.places[name].stored[0]
    if entry.dtype == "I8":
        return "int8 ConvRot" if checkpoint.quantised.rotation(stored) else "int8"
    return (
        f"scaled {entry.dtype}"
        if entry.dtype in FP8_TYPES and checkpoint.quantised.scale(stored)
        else entry.dtype
    )


def types_of(entries: Mapping[str, Entry]) -> dict[str, int]:
    """How many tensors have each type, most first."""
    return dict(Counter(entry.dtype for entry in entries.values()).most_common())


def engine_types(model: ModelConfig, part: Part, precision: Precision) -> dict[str, str]:
    """By canonical name the type that the engines take, as a key of ERRORS."""
    types = {}
    for network in networks(model, Plan(precision=precision)).values():
        if network.part == part:
            for n in range(network.repeats):
                for w in network.weights:
                    types[network.weight_key(w.name, n)] = ENGINE_TYPES[w.dtype]
    return types


def cost(checkpoint: Checkpoint, names: Iterable[str], engine: Mapping[str, str]) -> Cost:
    """What loading the tensors `names` for these engines costs. A type that the engine takes is copied; every
    other type is rounded once more.
    """
    error = numbers = bits = 0.0
    ages = [0]
    for name in names:
        count, stored = math.prod(checkpoint.shape(name)), type_of(checkpoint, name)
        wanted = engine.get(name, "F32")
        error += count * (ERRORS.get(stored, 1.0) + (ERRORS[wanted] if stored != wanted else 0.0))
        numbers += count
        for piece in checkpoint.places[name].stored:
            entry = checkpoint.file.entries[piece]
            bits += 8 * (entry.stop - entry.start)
            ages.append(checkpoint.quantised.age(piece))
    return Cost(round(error / max(1.0, numbers), DIGITS), round(bits / max(1.0, numbers), 2), -max(ages))
