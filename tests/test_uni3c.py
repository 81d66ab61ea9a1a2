"""Uni3C's networks: the golden numbers of addons_spec.md 9, and the velocity against diffusers' transformer
with residuals of an independent implementation (uni3c_oracle.py).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from oracles import diffusers_transformer
from test_transformer import random_inputs
from tiny_job import PLAN
from uni3c_oracle import fill, golden_weights, of_numpy, residuals

from trt_wan.build.models import uni3c as graphs
from trt_wan.build.models.block import attention
from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import TINY, CameraConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts.uni3c import STEPS
from trt_wan.engines.shape import CameraPlan, Plan
from trt_wan.runtime.denoise import Branch, predict_window
from trt_wan.runtime.executors import Array
from trt_wan.runtime.guidance import StepSettings
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    embed_image,
    encode_context,
    encode_motion,
    encode_time,
    fuser_keys,
    rope_tables,
    velocity,
)
from trt_wan.runtime.networks.uni3c import CameraResiduals, prepare_camera
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.random import random_weights

TOLERANCE = 1e-4
GOLDEN = [  # mean of the absolute values, first numbers of token 0
    (0.458014, (-0.587063, 1.027104, -0.497958)),
    (0.493402, (-0.296953, -0.648587, -0.296942)),
]
VIDEO, TIME = fill(1000, (36, 3, 4, 6), 2), fill(1001, (1, 20), 2)
T = 600


def test_the_oracle_has_the_golden_numbers() -> None:
    assert fill(0, (3,)).tolist() == pytest.approx([-0.48906916, -0.28626186, -0.46559526], abs=1e-8)
    assert len(golden_weights()) == 58
    made = residuals(golden_weights(), VIDEO, TIME, heads=2)
    _is_golden(made)
    assert [float(r.sum()) for r in made] == pytest.approx([13.317728, -41.888831], abs=1e-5)
    with_mask = residuals(golden_weights(), VIDEO, TIME, 2, fill(1002, (7, 9, 32, 48)))[1]
    assert float(with_mask.abs().mean()) == pytest.approx(0.610097, abs=1e-6)
    assert with_mask[0, :3].tolist() == pytest.approx([-0.036230, -0.561038, -0.335708], abs=1e-6)


def _is_golden(made: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    for residual, (mean, first) in zip(made, GOLDEN, strict=True):
        assert float(residual.abs().mean()) == pytest.approx(mean, abs=tolerance)
        assert residual[0, :3].tolist() == pytest.approx(first, abs=tolerance)


def test_our_graphs_have_the_golden_numbers() -> None:
    """The graphs take their sizes from the weights, so they take those of the specification too."""
    model = replace(TINY, camera=CameraConfig(dim=24, heads=2, ffn_dim=40, layers=2))
    weights = {name: tensor.float() for name, tensor in golden_weights().items()}
    shared: Any = {"model": model, "plan": Plan(48, 32, 5)}

    def at(scope: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(scope): t for n, t in weights.items() if n.startswith(scope)}

    video, zeros = VIDEO.float(), torch.zeros(16, 3, 4, 6)
    condition = torch.cat((video[16:20], zeros))
    (z,) = graphs.patch(video[:16], condition, video[20:], w=weights, **shared)
    rope = [torch.from_numpy(table) for table in rope_tables(model, shared["plan"], head_dim=12)]
    made = []
    for n in range(2):
        w = at(f"controlnet_blocks.{n}.")
        ((modulation,),) = graphs.modulation(TIME.float(), w=w, **shared)
        heads = graphs.block_in(z, modulation, *rope, w=w, **shared)
        (attended,) = attention(*heads, w={}, **shared)
        z, features = graphs.block_out(z, attended, modulation, w=w, **shared)
        zero, twice = torch.zeros(len(z), 48), torch.tensor([2.0])
        made.append(graphs.add(zero, features, twice, w=at(f"proj_out.{n}."), **shared)[0] / 2)
    _is_golden(made, 2e-6)


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Array]]:
    transformer = random_weights(TINY, "transformer", 1)
    return {
        "transformer": transformer | {ORTHONORMAL: orthonormal(transformer[DIRECTION])},
        "camera_control": random_weights(TINY, "camera_control", 2),
    }


@pytest.fixture(scope="module")
def model(make_model: MakeModel, weights: dict[str, dict[str, Array]]) -> Model:
    made = make_model(TINY, PLAN, weights)
    made.take(CameraPlan.beside(PLAN, TINY.camera.ffn_dim))
    return made


@pytest.fixture(scope="module")
def inputs() -> dict[str, Array]:
    made = random_inputs(PLAN, seed=4)
    made["face"][:] = made["face"][:1]  # one crop is encoded, here and by the oracle
    return made | {"render": random_inputs(PLAN, seed=5)["latent"]}


def condition_of(model: Model, inputs: dict[str, Array], face: Any) -> WindowCondition:
    one = np.ones(1, np.float32)
    return WindowCondition(inputs["condition"], inputs["pose"], one, face, one, render=inputs["render"])


def test_the_velocity_equals_diffusers_with_the_oracles_residuals(
    model: Model, weights: dict[str, dict[str, Array]], inputs: dict[str, Array]
) -> None:
    """Behind the fuser, in front of the next block: a residual elsewhere, or none, is another velocity."""
    strength, time = 0.7, encode_time(model, T)
    camera = prepare_camera(model, [time], [True], strength)
    motion = encode_motion(model, lambda start, stop: inputs["face"][start:stop], 1)
    window = condition_of(model, inputs, fuser_keys(model, motion.repeat(PLAN.frames, axis=0)))
    context = encode_context(model, inputs["text"], embed_image(model, inputs["image"]))
    video = inputs["latent"], inputs["condition"], inputs["render"]

    def ours(control: CameraResiduals | None) -> Array:
        rope = rope_tables(TINY, PLAN)
        return velocity(model, inputs["latent"], time, context, window, rope, control=control)

    transformer = diffusers_transformer(
        TINY, {n: v for n, v in weights["transformer"].items() if n != ORTHONORMAL}
    )
    motion_of = transformer.motion_encoder.forward
    transformer.motion_encoder.forward = lambda x, **more: motion_of(x[:1], **more).expand(len(x), -1)
    whole = torch.from_numpy(np.concatenate((inputs["latent"], inputs["condition"][:4], inputs["render"])))
    e = torch.from_numpy(np.asarray(time[0]))
    added = residuals(of_numpy(weights["camera_control"]), whole, e, TINY.camera.heads)
    assert len(added) == TINY.camera.layers < TINY.transformer.layers
    for residual, block in zip(added, transformer.blocks[1:], strict=True):

        def add(module: Any, args: tuple[Any, ...], r: torch.Tensor = residual) -> tuple[Any, ...]:
            return (args[0] + strength * r.float(), *args[1:])

        block.register_forward_pre_hook(add)
    batched = {name: torch.from_numpy(values)[None] for name, values in inputs.items()}
    with torch.no_grad():
        theirs = transformer(
            hidden_states=torch.cat((batched["latent"], batched["condition"]), dim=1),
            timestep=torch.tensor([T]),
            encoder_hidden_states=batched["text"],
            encoder_hidden_states_image=batched["image"],
            pose_hidden_states=batched["pose"],
            face_pixel_values=batched["face"].transpose(1, 2),
        ).sample[0]
    with_camera = ours(CameraResiduals(model, camera, 0, video, 1))
    assert np.abs(with_camera - theirs.numpy()).max() <= TOLERANCE
    assert np.abs(with_camera - ours(None)).max() > 0.1


class Counting:
    """Counts the calls of each network."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, dict[str, int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, network: Network, n: int, given: Any) -> Any:
        self.calls[network.name] = self.calls.get(network.name, 0) + 1
        return self.inner.run(network, n, given)


def test_both_sides_of_the_guidance_share_the_residuals(model: Model, inputs: dict[str, Array]) -> None:
    """The same bits as with residuals of their own, and every block of Uni3C runs once."""
    times = [encode_time(model, t) for t in (900, 500)]
    camera = prepare_camera(model, times, [True, False], 1.0)
    window = condition_of(model, inputs, None)
    contexts = [
        encode_context(model, text, embed_image(model, inputs["image"]))
        for text in (inputs["text"], -inputs["text"])
    ]
    rope, video = rope_tables(TINY, PLAN), (inputs["latent"], inputs["condition"], inputs["render"])
    apart = [
        velocity(
            *(model, inputs["latent"], times[0], context, window, rope),
            control=CameraResiduals(model, camera, 0, video, 1),
        )
        for context in contexts
    ]
    prepared: Any = type("Prepared", (), {"times": times, "rope": rope, "camera": camera})
    steps = [StepSettings(3.0, True, True, camera=acts) for acts in (True, False)]
    branches = [Branch(context, window) for context in contexts]
    with model.executed_by(Counting):
        predict = predict_window(model, prepared, branches, steps)
        counting: Any = model.executor
        together = predict(0, inputs["latent"])
        np.testing.assert_array_equal(together, model.executor.combine([(-2.0, apart[1]), (3.0, apart[0])]))
        layers = TINY.camera.layers
        counted = {name: count for name, count in counting.calls.items() if name.startswith("uni3c")}
        assert counted == {
            "uni3c_patch": 1,
            **dict.fromkeys(("uni3c_in", "uni3c_attention", "uni3c_out"), layers),
            "uni3c_add": 2 * layers,
        }
        counting.calls.clear()
        predict(1, inputs["latent"])
        assert not any(name.startswith("uni3c") for name in counting.calls), "the camera is off in that step"


def test_the_modulation_of_more_steps_than_a_call_takes(model: Model) -> None:
    times = [encode_time(model, 1000 - 20 * step) for step in range(STEPS + 2)]
    acting = [step != 3 for step in range(len(times))]
    made = prepare_camera(model, times, acting, 1.0).modulations
    assert [modulation is not None for modulation in made] == acting
    for step in (0, 4, STEPS - 1, STEPS + 1):
        (alone,) = prepare_camera(model, times[step : step + 1], [True], 1.0).modulations
        for ours, one in zip(made[step] or (), alone or (), strict=True):
            np.testing.assert_allclose(ours, one, atol=1e-5)
    assert not np.allclose((made[0] or [0])[0], (made[1] or [0])[0])
