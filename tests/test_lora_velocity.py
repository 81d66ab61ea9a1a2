"""The velocity of one transformer call with a LoRA, on every kind of base, against the fp32 merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeModel
from lora_files import FAMILIES, Array
from test_lora_merging import bases, merging_of, rms, weights  # noqa: F401  (fixtures)
from test_transformer import random_inputs, run_ours

from trt_wan.engines.checkpoint import ORTHONORMAL
from trt_wan.engines.shape import Plan
from trt_wan.runtime.job import Lora

PLAN = Plan(64, 96, 5)  # whose graphs test_transformer.py makes too
KINDS = ("bf16", "fp8", "int8", "int8 convrot", "Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def velocity(make_model: MakeModel) -> Callable[[Any], Array]:
    """Of a forward pass with these weights, without faces."""
    inputs = random_inputs(PLAN, seed=5)
    inputs["face"] = inputs["face"][:1].repeat(len(inputs["face"]), axis=0)

    def run(tensors: Any) -> Array:
        names = [name for name in tensors if name != ORTHONORMAL]
        return run_ours(make_model, {name: tensors[name] for name in names}, PLAN, inputs, 500)

    return run


def test_the_velocity_is_as_far_from_the_fp32_merge_as_the_base_is(
    velocity: Any,
    bases: Any,
    weights: dict[str, Array],
    tmp_path: Path,  # noqa: F811
) -> None:
    made = FAMILIES["lightx2v_own"]()
    path = made.save(tmp_path / "lora.safetensors")
    merged = {name: values + made.deltas.get(name, 0) for name, values in weights.items()}
    exact = velocity({name: values.astype(np.float32) for name, values in merged.items()})
    plain = velocity(weights)
    assert rms(exact - plain) > 0.1 * rms(plain), "the LoRA must matter"
    for kind in KINDS:
        base = bases(kind)
        changed = merging_of(base, Lora(path)).tensors
        of_base = rms(velocity({name: base[name] for name in weights}) - plain)
        error = rms(velocity({name: changed[name] for name in weights}) - exact)
        print(f"{kind}: {error / rms(exact):.2e} with the LoRA, {of_base / rms(plain):.2e} without")
        assert error <= 2 * of_base
