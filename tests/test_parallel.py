"""Several ranks against one, on ONNX Runtime: forwards of the transformer, and whole jobs.

Ranks are threads here, and test_gpus.py has processes.
"""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeModel, told_by
from ranks_in_threads import at_once, connected
from test_transformer import random_inputs
from tiny_job import BUILD, PLAN, prepare, write_reference, write_sound

from trt_wan.build.export import export
from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    embed_image,
    encode_context,
    encode_face,
    encode_time,
    rope_tables,
    velocity,
)
from trt_wan.runtime.parallel.planner import share_plan
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.sequence import HostSequence
from trt_wan.runtime.parallel.shards import Shards
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.random import random_weights

TOLERANCE = 1e-5  # fp32; values of order 1
Weights = Mapping[str, Any]


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    made = random_weights(TINY, "transformer", seed=1)
    return {"transformer": made | {ORTHONORMAL: orthonormal(made[DIRECTION])}}


def forwards(model: Model, inputs: dict[str, Array]) -> list[Array]:
    """Velocities of one latent: with a face, without, with NAG, with a second picture, block-sparse."""
    one, rank = np.ones(1, np.float32), model.ranks
    face = encode_face(model, inputs["face"])
    image = embed_image(model, inputs["image"])
    context, away = (encode_context(model, text, image) for text in (inputs["text"], -inputs["text"]))
    number = [np.array([value], np.float32) for value in (4, 1.5, 0.5)]
    nag = [(*layer, *other[:2], *number) for layer, other in zip(context, away, strict=True)]
    time = encode_time(model, 500)
    window = WindowCondition(inputs["condition"], inputs["pose"], one, face, one)
    ropes = [rope_tables(TINY, model.plan, pictures) for pictures in (0, 1)]
    if model.sequence is not None:
        ropes = [(model.sequence.split(cos), model.sequence.split(sin)) for cos, sin in ropes]

    def run(context: Any, window: WindowCondition, rope: Any = ropes[0], **more: Any) -> Array:
        assert rank is model.ranks
        return np.array(velocity(model, inputs["latent"], time, context, window, rope, **more))

    return [
        run(context, window),
        run(context, replace(window, face=None)),
        run(nag, window, cross_attention="cross_attention_nag"),
        run(context, replace(window, pictures=1), ropes[1]),
        run(context, window, keep=np.array([0.5], np.float32)),
    ]


def rank_model(whole: Model, weights: Weights, graphs: Path, ranks: Ranks) -> Model:
    """A rank's model, with the graphs of `whole` beside those of its share."""
    share = share_plan(TINY, whole.plan, ranks.count, overlaps=False)
    executor = OnnxRuntimeExecutor(whole.executor.graphs, BoundWeights(weights))  # type: ignore[attr-defined]
    executor.add(graphs, networks(TINY, share))
    model = Model(TINY, whole.plan, executor, weights, ranks=ranks)
    model.take(share)
    model.sequence = HostSequence(ranks, Shards.of(TINY, share))
    return model


long = pytest.mark.long
SIZES = [(64, 48, 13), (64, 96, 5), (112, 48, 13), (48, 32, 77)]  # of test_transformer.py


@pytest.mark.parametrize(
    ("size", "count"),
    [
        # A slot of 12 tokens over 5 ranks: the last one has none. TINY has two heads.
        ((64, 48, 13), 5),
        ((64, 48, 13), 2),
        *(pytest.param(size, count, marks=long) for size in SIZES for count in (1, 2, 3, 4)),
    ],
)
def test_the_velocity_of_ranks_is_that_of_one(
    make_model: MakeModel, weights: Weights, tmp_path: Path, size: tuple[int, int, int], count: int
) -> None:
    plan = Plan(*size)
    inputs, whole = random_inputs(plan, seed=count), make_model(TINY, plan, weights)
    alone = forwards(whole, inputs)
    others = alone[:4]  # attention over one block of tokens is dense
    apart = [np.abs(a - b).max() for k, a in enumerate(others) for b in others[:k]]
    assert min(apart) > TOLERANCE, "two of the forwards are the same"
    share = share_plan(TINY, plan, count, overlaps=False)
    for name, network in networks(TINY, share).items():
        export(network, TINY, share, tmp_path / f"{name}.onnx")
    with connected(count) as all_ranks:
        models = [rank_model(whole, weights, tmp_path, ranks) for ranks in all_ranks]
        for made in at_once([partial(forwards, model, inputs) for model in models]):
            for ours, expected in zip(made, alone, strict=True):
                assert np.abs(ours - expected).max() <= TOLERANCE
