"""The transformer, graph by graph, against diffusers' WanAnimateTransformer3DModel in fp32."""

import numpy as np
import pytest
import torch
from conftest import MakeModel
from oracles import diffusers_transformer

from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import TINY
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    embed_image,
    encode_blank_face,
    encode_context,
    encode_face,
    encode_time,
    rope_tables,
    velocity,
)
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.random import random_weights

TOLERANCE = 1e-4  # fp32 against fp32, values of order 1; measured 2e-6 to 2e-5


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    return random_weights(TINY, "transformer", seed=1)


def run_ours(
    make_model: MakeModel,
    weights: dict[str, Array],
    plan: Plan,
    inputs: dict[str, Array],
    t: int,
    keep: Array | None = None,
) -> Array:
    model = make_model(TINY, plan, {"transformer": weights | {ORTHONORMAL: orthonormal(weights[DIRECTION])}})
    face = encode_blank_face(model) if inputs["face"] is None else encode_face(model, inputs["face"])
    one = np.ones(1, np.float32)
    window = WindowCondition(inputs["condition"], inputs["pose"], one, face, one)
    context = encode_context(model, inputs["text"], embed_image(model, inputs["image"]))
    time = encode_time(model, t)
    rope = rope_tables(TINY, plan)
    return velocity(model, inputs["latent"], time, context, window, rope, keep=keep)


def run_diffusers(weights: dict[str, Array], inputs: dict[str, Array], t: int) -> Array:
    batched = {name: torch.from_numpy(values)[None] for name, values in inputs.items()}
    with torch.no_grad():
        result = diffusers_transformer(TINY, weights)(
            hidden_states=torch.cat((batched["latent"], batched["condition"]), dim=1),
            timestep=torch.tensor([t]),
            encoder_hidden_states=batched["text"],
            encoder_hidden_states_image=batched["image"],
            pose_hidden_states=batched["pose"],
            face_pixel_values=batched["face"].transpose(1, 2),
        ).sample
    return result[0].numpy()


def random_inputs(plan: Plan, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    h, w = plan.latent_height, plan.latent_width
    size = TINY.motion.size
    coarse = rng.uniform(-1, 1, (plan.frames, 3, 16, 16)).astype(np.float32)  # blocks: a smooth-ish picture
    return {
        "latent": normal(16, plan.slots, h, w),
        "condition": normal(20, plan.slots, h, w),
        "pose": normal(16, plan.latent_frames, h, w),
        "face": coarse.repeat(size // 16, axis=2).repeat(size // 16, axis=3),
        "text": normal(TINY.text.length, TINY.text.dim),
        "image": normal(TINY.image.tokens, TINY.image.dim),
    }


@pytest.mark.parametrize(
    ("width", "height", "frames", "t"),
    [
        (64, 96, 5, 999),
        (64, 48, 13, 1),
        pytest.param(112, 48, 13, 1, marks=pytest.mark.long),
        pytest.param(48, 32, 77, 625, marks=pytest.mark.long),
    ],
)
def test_velocity_equals_diffusers(
    make_model: MakeModel, weights: dict[str, Array], width: int, height: int, frames: int, t: int
) -> None:
    plan = Plan(width, height, frames)
    inputs = random_inputs(plan, seed=frames)
    ours, theirs = run_ours(make_model, weights, plan, inputs, t), run_diffusers(weights, inputs, t)
    assert theirs.std() > 0.1, "the oracle's output is degenerate"
    assert np.abs(ours - theirs).max() <= TOLERANCE


def test_block_sparse_attention_takes_the_place_of_dense(
    make_model: MakeModel, weights: dict[str, Array]
) -> None:
    """The same where all tokens are one block (test_turbo.py has the attention itself)."""
    plan = Plan(64, 96, 5)  # whose graphs are there from the test above
    inputs = random_inputs(plan, seed=3)
    dense = run_ours(make_model, weights, plan, inputs, 500)
    sparse = run_ours(make_model, weights, plan, inputs, 500, keep=np.array([0.5], np.float32))
    assert 0 < np.abs(sparse - dense).max() <= TOLERANCE


def test_face_and_pose_strength(make_model: MakeModel, weights: dict[str, Array]) -> None:
    """Strength 0 is the same as no clip, strength 1 is not; the blank face is the face of black crops."""
    plan = Plan(64, 96, 5)  # whose graphs are there from the test above
    inputs = random_inputs(plan, seed=2)
    model = make_model(TINY, plan, {"transformer": weights | {ORTHONORMAL: orthonormal(weights[DIRECTION])}})
    context = encode_context(model, inputs["text"], embed_image(model, inputs["image"]))
    time, rope = encode_time(model, 500), rope_tables(TINY, plan)
    face = encode_face(model, inputs["face"])
    no_pose = np.zeros_like(inputs["pose"])

    def run(pose: Array, pose_strength: float, face_kv: object, face_strength: float) -> Array:
        strengths = (np.array([strength], np.float32) for strength in (pose_strength, face_strength))
        window = WindowCondition(inputs["condition"], pose, next(strengths), face_kv, next(strengths))
        return velocity(model, inputs["latent"], time, context, window, rope)

    nothing = run(no_pose, 0, None, 1)
    np.testing.assert_allclose(run(inputs["pose"], 0, face, 0), nothing, atol=1e-6)
    assert np.abs(run(inputs["pose"], 1, None, 1) - nothing).max() > 1e-2
    assert np.abs(run(no_pose, 0, face, 1) - nothing).max() > 1e-2

    black = np.full_like(inputs["face"], -1)
    for ours, expected in zip(encode_blank_face(model), encode_face(model, black), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)
