"""Names the type in which a file stores its numbers, and the loss of that type.

ERRORS has the loss of a type by itself: the rms of the difference from the float32 original, as a share of
the rms of W. Measured on normal numbers 1200x512 over sqrt(512), of FP8 without a scale 1200x5120 over
sqrt(5120), with rows scaled 0.5 to 1 (K types: by the simple writer of tests/k_quants.py, not llama.cpp's).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trt_wan.engines.checkpoint import networks_of
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.precision import Precision
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.stored import FP8_TYPES

ERRORS = {
    "F64": 0.0,
    "F32": 0.0,
    "F16": 2e-4,
    "BF16": 1.7e-3,
    "scaled F8_E4M3": 2.6e-2,
    "F8_E4M3": 5.3e-2,
    "scaled F8_E5M2": 5.2e-2,
    "F8_E5M2": 5.3e-2,
    "int8 ConvRot": 7.4e-3,
    "int8": 1.3e-2,
    "Q8_0": 5.4e-3,
    "Q6_K": 2.2e-2,
    "Q5_1": 3.8e-2,
    "Q5_K": 3.8e-2,
    "Q5_0": 4.3e-2,
    "Q4_1": 7.8e-2,
    "Q4_K": 7.8e-2,
    "Q4_0": 8.6e-2,
    "Q3_K": 1.8e-1,
    "Q2_K": 3.3e-1,
}
ENGINE_TYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "scaled F8_E4M3",
    "int8": "int8 ConvRot",
}
DIGITS = 4  # kept of a cost; files that differ by less compete
NEWEST = 2  # Quantised.age of the newest layout


@dataclass(frozen=True, order=True)
class Cost:
    """Files are taken in this order, the smallest first. Equal costs compete."""

    error: float  # the mean over the weights in the engines' most common type, after loading
    bits: float  # per number of them: of two that lose the same the shorter one is read faster
    age: int  # 0: the newest layout
    rest: float  # the error of all other tensors


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


def engine_types(model: ModelConfig, part: Part, precision: Precision) -> dict[str, str]:
    """By canonical name the type that the engines take, as a key of ERRORS."""
    types = {}
    for network in networks_of(model, part, precision):
        for n in range(network.repeats):
            for w in network.weights:
                types[network.weight_key(w.name, n)] = ENGINE_TYPES[w.dtype]
    return types


def cost(checkpoint: Checkpoint, names: Iterable[str], engine: Mapping[str, str]) -> Cost:
    """The cost of loading the tensors `names` for these engines. A type that the engine takes is copied, and
    every other type is rounded once more.
    """
    sizes = {name: math.prod(checkpoint.shape(name)) for name in names}
    common = Counter[str]()
    for name, size in sizes.items():
        common[engine.get(name, "F32")] += size
    main = common.most_common(1)[0][0]
    errors, numbers, bits, age = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0, 0
    for name, size in sizes.items():
        stored, wanted = type_of(checkpoint, name), engine.get(name, "F32")
        is_main = wanted == main
        errors[is_main] += size * (ERRORS.get(stored, 1.0) + (ERRORS[wanted] if stored != wanted else 0.0))
        numbers[is_main] += size
        for piece in checkpoint.places[name].stored if is_main else ():
            entry = checkpoint.file.entries[piece]
            bits += 8 * (entry.stop - entry.start)
            age = max(age, checkpoint.quantised.age(piece))
    error, rest = (round(errors[is_main] / max(1, numbers[is_main]), DIGITS) for is_main in (True, False))
    return Cost(error, round(bits / max(1, numbers[True]), 2), NEWEST - age, rest)
