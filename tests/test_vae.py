"""The VAE against diffusers on the same random weights, for every way of cutting the clip into chunks.

Weights are made under their official names from the contracts and reach diffusers through its own converter,
loaded strictly, so the names, shapes and number of tensors are compared too.
"""

import math
import resource
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from eager_vae import EagerExecutor, random_weights, vae_networks, weight_shapes

from trt_wan.build.export import export
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks import vae
from trt_wan.runtime.networks.model import Model

WIDTH, HEIGHT, LONGEST = 64, 48, 17  # the size of `tiny_home`
TOLERANCE = 1e-4

MIB = 1 << 20


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    return random_weights()


class Oracle:
    """diffusers' VAE with the normalisation that its pipelines put around it. A length is computed once."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self.vae = AutoencoderKLWan(base_dim=TINY.vae.base_dim, z_dim=TINY.vae.latent_channels).eval()
        converted = convert_wan_vae_to_diffusers({k: torch.from_numpy(v) for k, v in weights.items()})
        self.vae.load_state_dict(converted, strict=True)
        self.mean, self.std = (
            torch.tensor(values).reshape(-1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        self.latent, self.frames = cache(self._latent), cache(self._frames)

    def _latent(self, count: int) -> Array:
        with torch.no_grad():
            posterior = self.vae.encode(torch.from_numpy(random_frames(count))[None]).latent_dist
        return ((posterior.mode()[0] - self.mean) / self.std).numpy()

    def _frames(self, count: int) -> Array:
        z = torch.from_numpy(random_latent(count)) * self.std + self.mean
        with torch.no_grad():
            return self.vae.decode(z[None]).sample[0].numpy()


@pytest.fixture(scope="module")
def oracle(weights: dict[str, Array]) -> Oracle:
    return Oracle(weights)


def random_frames(count: int) -> Array:
    frames = np.random.default_rng(count).uniform(-1, 1, (3, count, HEIGHT, WIDTH))
    return frames.astype(np.float32)


def random_latent(count: int) -> Array:
    """The latent of `count` frames."""
    shape = (TINY.vae.latent_channels, (count - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    return np.random.default_rng(count).standard_normal(shape).astype(np.float32)


def check_encode(model: Model, oracle: Oracle, count: int) -> None:
    want = oracle.latent(count)
    np.testing.assert_allclose(vae.encode(model, random_frames(count)), want, rtol=0, atol=TOLERANCE)
    assert want.shape == random_latent(count).shape
    assert want.std() > 0.1


def check_decode(model: Model, oracle: Oracle, count: int) -> None:
    want = oracle.frames(count)
    chunks = list(vae.decode(model, random_latent(count)))
    step = 4 * model.plan.vae_chunk
    assert [chunk.shape[1] for chunk in chunks] == [1] + [step] * ((count - 1) // step)
    clamped = np.concatenate(chunks, axis=1).clip(-1, 1)
    np.testing.assert_allclose(clamped, want, rtol=0, atol=TOLERANCE)
    inside = np.abs(want) < 1
    assert inside.mean() > 0.8 and want.std() > 0.1, "the comparison would see little but the clamp"
    assert not inside.all(), "the comparison would not see the clamp"


@pytest.mark.parametrize("count", [1, 5, 9, 17])
def test_exported_graphs_equal_diffusers(make_model, weights, oracle, count: int) -> None:
    model = make_model(TINY, Plan(WIDTH, HEIGHT, LONGEST), {"vae": weights})
    check_encode(model, oracle, count)
    check_decode(model, oracle, count)


@pytest.mark.parametrize(("chunk", "count"), [(1, 17), (2, 9), (2, 17), (4, 17), (4, 33)])
def test_every_chunk_size_equals_diffusers(weights, oracle, chunk: int, count: int) -> None:
    plan = Plan(WIDTH, HEIGHT, count, vae_chunk=chunk)
    model = Model(TINY, plan, EagerExecutor(TINY, plan, {"vae": weights}), {"vae": weights})
    check_encode(model, oracle, count)
    check_decode(model, oracle, count)


@pytest.mark.parametrize("count", [2, 5, 12])
def test_a_clip_that_does_not_divide_into_chunks_is_refused(weights, count: int) -> None:
    plan = Plan(WIDTH, HEIGHT, LONGEST, vae_chunk=2)
    model = Model(TINY, plan, EagerExecutor(TINY, plan, {"vae": weights}), {"vae": weights})
    with pytest.raises(AssertionError, match="multiple of 8"):
        vae.encode(model, random_frames(count))


def test_the_full_size_has_the_checkpoints_tensors_and_caches() -> None:
    shapes = weight_shapes(ANIMATE_14B)
    assert len(shapes) == 194
    assert sum(math.prod(shape) for shape in shapes.values()) == 126_892_531

    _, encode, _, decode = vae_networks(ANIMATE_14B, Plan(832, 480))
    elements = [sum(math.prod(t.shape) for t in network.inputs[1:]) for network in (encode, decode)]
    assert [len(encode.inputs) - 1, len(decode.inputs) - 1] == [24, 32]
    assert [round(n / 1e6, 1) for n in elements] == [560.7, 944.3]  # model_spec.md 7.2


@pytest.mark.long
def test_the_full_size_exports_in_little_memory(tmp_path: Path) -> None:
    plan = Plan(832, 480)
    network = networks(ANIMATE_14B, plan)["vae_decode_next"]  # 4.3 GiB of weights and caches, were they real
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export(network, ANIMATE_14B, plan, tmp_path / "graph.onnx")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 512, f"peak memory grew by {grown:.0f} MiB"
    assert (tmp_path / "graph.onnx").stat().st_size < MIB
