"""Lynx: the golden numbers of addons_spec.md 9, and the velocity against an implementation from its text.

Files are in test_lynx_files.py, the options in test_identity.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eager_vae import EagerExecutor
from lynx_oracle import CrossAttention, SelfAttention, face_features, forward, resample
from oracles import diffusers_transformer, diffusers_vae
from test_guidance import filled
from test_transformer import TOLERANCE, random_inputs

from trt_wan.build.export import export
from trt_wan.build.models import lynx as graphs
from trt_wan.engines import lynx
from trt_wan.engines.checkpoint import DIRECTION, LYNX_PARTS, ORTHONORMAL
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.contracts.lynx_ip import resampler
from trt_wan.engines.lynx import FacePlan, Kind, Lynx, LynxConfig, LynxPlan, ip_blocks, lynx_of, lynx_plans
from trt_wan.engines.shape import Plan
from trt_wan.runtime.denoise import Branch, predict_window
from trt_wan.runtime.executors import Array
from trt_wan.runtime.guidance import StepSettings
from trt_wan.runtime.networks.lynx import LynxKeys
from trt_wan.runtime.networks.lynx_keys import FaceInputs, encode_identity
from trt_wan.runtime.networks.model import LynxModel, Model
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    embed_image,
    encode_context,
    encode_time,
    rope_tables,
    velocity,
)
from trt_wan.runtime.preparation import Prepared
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.random import random_weights

PLAN = Plan(64, 48, 5)


# --- Golden numbers --------------------------------------------------------------------------------------


def fill(k: int, *shape: int, amp: float = 1.0, base: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(filled(k, shape, amp, base).astype(np.float32))


GOLDEN = LynxConfig(dim=24, layers=2, heads=3, head_dim=6, queries=4, registers=3, lite_dim=14)


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of width 12 and 2 heads."""
    monkeypatch.setitem(lynx.SIZES, "golden", GOLDEN)
    return replace(TINY, name="golden", transformer=replace(TINY.transformer, dim=12, heads=2))


def is_golden(made: torch.Tensor, mean: float, first: tuple[float, ...]) -> None:
    assert made.abs().mean().item() == pytest.approx(mean, abs=2e-6)
    np.testing.assert_allclose(made[0, :3], first, atol=2e-6)


def test_the_resampler(golden: Any) -> None:
    plan = LynxPlan(kind="lite")
    shapes = {w.name: w.shape for w in resampler(golden, plan).weights} | {"proj_in.weight": (24, 10)}
    norms = ("norm1.weight", "norm2.weight", ".1.0.weight", "norm_out.weight")
    weights = {
        name: fill(k, *shapes[name], amp=0.5, base=float(name.endswith(norms)))
        for k, name in enumerate(sorted(shapes))
    }
    assert len(weights) == 29
    for face, mean, first in (
        (fill(2000, 1, 10, amp=2), 0.810697, (-0.642777, -0.228014, 0.152812)),
        (torch.zeros(1, 10), None, (0.150669, -0.866380, -0.572938)),
    ):
        (made,) = graphs.resampler(face, w=weights, model=golden, plan=plan)
        assert made.shape == (4, 14)
        is_golden(made, made.abs().mean().item() if mean is None else mean, first)
        theirs = resample({name: w.numpy() for name, w in weights.items()}, face, 3)
        np.testing.assert_allclose(made, theirs, atol=2e-6)  # the oracle too


def adapter_weights(first: int, *names: str, bias: bool = True, inner: int = 12) -> dict[str, torch.Tensor]:
    numbers = iter(range(first, first + 4))
    made = {}
    for name in names:
        made[f"{name}.weight"] = fill(next(numbers), 12, inner)
        if bias:
            made[f"{name}.bias"] = fill(next(numbers), 12)
    return made


def golden_q() -> torch.Tensor:
    x = fill(3000, 5, 12, amp=2)
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * fill(3001, 12, amp=0.5, base=1)


NORM_K = {"norm_k.weight": fill(3002, 12, amp=0.5, base=1)}


def test_the_full_ip_adapter(golden: Any) -> None:
    plan = LynxPlan(kind="full")
    weights = {"registers": fill(3004, 3, 12, amp=0.5)[None], **adapter_weights(3005, "to_k_ip", "to_v_ip")}
    k, v = graphs.ip_kv(fill(3003, 4, 12, amp=2), w=weights, model=golden, plan=plan)
    (k,) = graphs.ip_norm(k, w=NORM_K, model=golden, plan=plan)
    q = golden_q() * 6**-0.5
    (made,) = graphs.ip(q, torch.zeros(5, 12), k, v, torch.ones(1), w={}, model=golden, plan=plan)
    is_golden(made, 0.281176, (-0.506982, 0.369795, -0.321851))
    (half,) = graphs.ip(q, torch.ones(5, 12), k, v, torch.tensor([0.5]), w={}, model=golden, plan=plan)
    np.testing.assert_allclose(half, 1 + made / 2, atol=1e-6)


def test_the_lite_ip_adapter(golden: Any) -> None:
    plan = LynxPlan(kind="lite")
    weights = adapter_weights(3010, "to_k_ip", "to_v_ip", bias=False, inner=6)
    k, v = graphs.ip_kv(fill(3009, 4, 6, amp=2), w=weights, model=golden, plan=plan)
    q = golden_q() * 6**-0.5
    (made,) = graphs.ip(q, torch.zeros(5, 12), k, v, torch.ones(1), w={}, model=golden, plan=plan)
    is_golden(made, 0.212007, (0.238849, -0.090515, 0.286175))


def test_the_ref_adapter_undoes_the_rotation(golden: Any) -> None:
    weights = adapter_weights(3013, "to_k_ref", "to_v_ref")
    k, v = graphs.ref_kv(fill(3012, 6, 12, amp=2), w=weights, model=golden, plan=FacePlan())
    (k,) = graphs.ref_norm(k, w=NORM_K, model=golden, plan=FacePlan())
    angles = np.random.default_rng(1).uniform(-3, 3, (5, 3))
    turn = torch.from_numpy(np.exp(1j * angles).astype(np.complex64))[:, None]
    pairs = torch.view_as_complex((golden_q() * 6**-0.5).reshape(5, 2, 3, 2))
    q = torch.view_as_real(pairs * turn).reshape(5, 2, 6).transpose(0, 1)
    tables = [torch.from_numpy(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    (made,) = graphs.ref(
        q, *tables, torch.zeros(5, 12), k, v, torch.ones(1), w={}, model=golden, plan=LynxPlan()
    )
    is_golden(made, 0.380336, (-0.397073, -0.293658, -0.258477))


# --- The whole velocity ----------------------------------------------------------------------------------


Parts = Mapping[str, dict[str, Array]]


def all_weights(kind: Kind) -> dict[str, dict[str, Array]]:
    transformer = random_weights(TINY, "transformer", 1)
    made = {part: random_weights(TINY, part, 2, kind) for part in LYNX_PARTS}  # type: ignore[arg-type]
    for name in ("registers", "latents"):  # of the size that trained ones have
        for weights in made.values():
            weights.update({key: 10 * values for key, values in weights.items() if key.endswith(name)})
    return {
        "transformer": transformer | {ORTHONORMAL: orthonormal(transformer[DIRECTION])},
        "vae": random_weights(TINY, "vae", 3),
        **made,
    }


def eager_model(weights: Any, adapters: Lynx) -> Model:
    """Without exports: the graphs' functions themselves."""
    model = Model(TINY, PLAN, EagerExecutor(TINY, PLAN, weights), {})
    plan = LynxPlan.of(PLAN, adapters.kind)
    model.executor.plan = plan  # type: ignore[attr-defined]  # a Plan too, and the only one with a kind
    model.networks |= networks(TINY, plan)
    face = Model(TINY, FacePlan(), EagerExecutor(TINY, FacePlan(), weights), {})
    model.lynx = LynxModel(adapters, face)
    return model


def face_inputs(seed: int = 0) -> FaceInputs:
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal(512).astype(np.float32)
    picture = rng.uniform(-1, 1, (3, 1, 256, 256)).astype(np.float32)
    noise = rng.standard_normal((16, 1, 32, 32), np.float32)
    return FaceInputs(embedding / np.linalg.norm(embedding), picture, noise, 0.7, 0.6)


def split(weights: dict[str, Array], n: int) -> dict[str, Array]:
    return {name.partition(".")[2]: v for name, v in weights.items() if name.partition(".")[0] == str(n)}


class Window:
    """A window without a face clip, and all that a velocity of it needs."""

    def __init__(self, model: Model) -> None:
        self.model, self.inputs = model, random_inputs(PLAN, seed=9)
        one = np.ones(1, np.float32)
        self.window = WindowCondition(self.inputs["condition"], self.inputs["pose"], one, None, one)
        self.context = encode_context(model, self.inputs["text"], embed_image(model, self.inputs["image"]))
        self.time, self.rope = encode_time(model, 600), rope_tables(TINY, PLAN)

    def velocity(self, identity: LynxKeys | None) -> Array:
        i = self.inputs
        return velocity(
            self.model, i["latent"], self.time, self.context, self.window, self.rope, identity=identity
        )


def other_text() -> Array:
    return np.random.default_rng(4).standard_normal((512, TINY.text.dim), np.float32)


@pytest.mark.parametrize("kind", ["full", "lite"])
def test_the_velocity_is_that_of_the_formulas(kind: Kind) -> None:
    weights, inputs = all_weights(kind), face_inputs()
    model = eager_model(weights, Lynx(True, True, kind))
    both, nobody = encode_identity(model, inputs, other_text(), guided=True)
    assert nobody is not None and model.lynx is not None and model.lynx.face is not None
    ours = Window(model)

    theirs = diffusers_transformer(TINY, random_weights(TINY, "transformer", 1))
    i = {name: torch.from_numpy(values)[None] for name, values in ours.inputs.items()}

    def features_of(picture: Array) -> list[torch.Tensor]:
        (latent,) = model.lynx.face.run("lynx_face_encode", picture, inputs.noise)  # type: ignore[union-attr]
        return face_features(theirs, torch.from_numpy(latent), torch.from_numpy(other_text()))

    def oracle(keys: LynxKeys, face: Array, features: list[torch.Tensor]) -> tuple[Array, Array]:
        tokens = resample(weights["lynx_resampler"], torch.from_numpy(face)[None], lynx_of(TINY).heads)
        blocks = list(ip_blocks(TINY, kind))
        for n, block in enumerate(theirs.blocks):
            ref, ip = keys.ref is not None, keys.ip is not None and n in blocks
            own = split(weights["lynx_ref"], n) if ref else None
            block.attn1.set_processor(SelfAttention(own, features[n], inputs.ref_scale))
            own = split(weights["lynx_ip"], blocks.index(n)) if ip else None
            block.attn2.set_processor(CrossAttention(own, tokens, inputs.ip_scale))
        latent36 = torch.cat([i["latent"], i["condition"]], 1)
        made = forward(theirs, latent36, i["pose"], 600.0, i["text"], i["image"])[0].numpy()
        return ours.velocity(keys), made

    assert inputs.embedding is not None and inputs.picture is not None
    plain = ours.velocity(None)
    alone = [replace(both, ip=None), replace(both, ref=None)]
    features = features_of(inputs.picture)
    for keys in (both, *alone):
        mine, made = oracle(keys, inputs.embedding, features)
        assert np.abs(mine - made).max() <= TOLERANCE
        assert np.abs(mine - plain).max() > 100 * TOLERANCE, "the adapter acts"
    mine, made = oracle(nobody, np.zeros(512, np.float32), features_of(np.zeros_like(inputs.picture)))
    assert np.abs(mine - made).max() <= TOLERANCE
    assert np.abs(mine - ours.velocity(both)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["lynx_ref", "lynx_ref_kv"])
def test_full_size_graphs_are_exported(name: str, tmp_path: Path) -> None:
    """With the contract's names, shapes and types. tests/graph_hashes.py has the tiny model's graphs."""
    plan = Plan(832, 480, 77, "fp8")
    made = {shape: networks(ANIMATE_14B, shape) for shape in lynx_plans(plan, Lynx(True, True))}
    shape = next(shape for shape in made if name in made[shape])
    export(made[shape][name], ANIMATE_14B, shape, tmp_path / "graph.onnx")
    assert (tmp_path / "graph.onnx").stat().st_size < 1e5, "no weights and no tables in it"


def test_the_latent_of_the_face_is_drawn_from_the_encoders_distribution() -> None:
    weights, inputs = all_weights("full"), face_inputs()
    face = Model(TINY, FacePlan(), EagerExecutor(TINY, FacePlan(), weights), {})
    assert inputs.picture is not None
    (ours,) = face.run("lynx_face_encode", inputs.picture, inputs.noise)
    vae = diffusers_vae(TINY, weights["vae"])
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(inputs.picture)[None]).latent_dist
    drawn = posterior.mean[0] + posterior.std[0] * torch.from_numpy(inputs.noise)
    mean, std = (
        torch.tensor(v).reshape(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    np.testing.assert_allclose(ours, (drawn - mean) / std, atol=1e-4)
    (mode,) = face.run("lynx_face_encode", inputs.picture, np.zeros_like(inputs.noise))
    assert np.abs(ours - mode).max() > 0.01


def test_the_identity_acts_in_its_steps_and_on_its_side() -> None:
    """With guidance: the face on the prompt's side, no face on the negative prompt's."""
    model = eager_model(all_weights("full"), Lynx(True, True))
    keys, nobody = encode_identity(model, face_inputs(), other_text(), guided=True)
    window = Window(model)
    prepared = Prepared(None, [window.time] * 3, window.rope, np.zeros(0), None)  # type: ignore[arg-type]
    branches = [Branch(window.context, window.window, identity=side) for side in (keys, nobody)]
    steps = [
        StepSettings(1.0, True, True, identity=True),
        StepSettings(2.0, True, True, identity=True),
        StepSettings(1.0, True, True),
    ]
    predict = predict_window(model, prepared, branches, steps)
    v, u, plain = (window.velocity(side) for side in (keys, nobody, None))
    latent = window.inputs["latent"]
    np.testing.assert_array_equal(predict(0, latent), v)
    np.testing.assert_allclose(predict(1, latent), 2 * v - u, atol=1e-5)
    np.testing.assert_array_equal(predict(2, latent), plain)
    assert np.abs(v - u).max() > 0.01 and np.abs(v - plain).max() > 0.01
