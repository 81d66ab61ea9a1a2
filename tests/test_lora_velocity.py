"""The velocity of one transformer call with a LoRA, on every kind of base, against the fp32 merge."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import FAMILIES, Array
from test_lora_merging import bases, merging_of, rms, weights  # noqa: F401  (fixtures)
from test_transformer import random_inputs
from tiny_job import PLAN

from trt_wan.engines.config import TINY
from trt_wan.engines.store.graphs import require_graphs
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.job import Lora
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    embed_image,
    encode_context,
    encode_time,
    rope_tables,
)
from trt_wan.runtime.networks.transformer import velocity as velocity_of

KINDS = ("bf16", "fp8", "int8", "int8 convrot", "Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def velocity(tiny_home: Path) -> Callable[[Any], Array]:
    """Of a forward pass with these weights, without a face."""
    inputs, one = random_inputs(PLAN, seed=5), np.ones(1, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        graphs = require_graphs(TINY, PLAN)

    def run(tensors: Mapping[str, Array]) -> Array:
        executor = OnnxRuntimeExecutor(graphs, BoundWeights({"transformer": tensors}))
        model = Model(TINY, PLAN, executor, {})
        context = encode_context(model, inputs["text"], embed_image(model, inputs["image"]))
        window = WindowCondition(inputs["condition"], inputs["pose"], one, None, one)
        time, rope = encode_time(model, 500), rope_tables(TINY, PLAN)
        return velocity_of(model, inputs["latent"], time, context, window, rope)

    return run


def test_the_velocity_is_as_far_from_the_fp32_merge_as_the_base_is(
    velocity: Any,
    bases: Any,  # noqa: F811
    weights: dict[str, Array],  # noqa: F811
    tmp_path: Path,
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
