"""The VAE in two tiles: where they are cut, how they are mixed, and the result against the whole one.

Each part of the difference has a test of its own. A tile's convolutions see zeros beyond the cut, which fades
with the distance from it. The attention of the middle block sees a tile alone, which changes every pixel.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from eager_vae import EagerExecutor, random_weights
from hypothesis import given
from hypothesis import strategies as st

from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.shape import TILE_OVERLAP, Plan, VaeTile
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks import vae
from trt_wan.runtime.networks.model import Model

SMALL = replace(TINY, vae=replace(TINY.vae, residual_blocks=1))
WIDE, TALL, LEAST = Plan(256, 16, 5), Plan(16, 256, 5), Plan(160, 16, 9)
CHANNELS = TINY.vae.latent_channels
sides = st.integers(1, 128).map(lambda n: 16 * n)


def tile_of(plan: Plan) -> VaeTile:
    assert plan.vae_tile is not None
    return plan.vae_tile


@given(sides, sides)
def test_two_equal_tiles_cover_the_longer_side(width: int, height: int) -> None:
    plan = Plan(width, height, 9, "fp8", vae_chunk=2)
    tile = plan.vae_tile
    longer, shorter = max(width, height), min(width, height)
    if tile is None:
        assert longer <= 8 * (TILE_OVERLAP + 2)
        return
    side = tile.height if height > width else tile.width
    overlap = 2 * side - longer
    assert TILE_OVERLAP <= overlap // 8 <= TILE_OVERLAP + 2 and overlap % 16 == side % 16 == 0
    assert {side, shorter} == {tile.width, tile.height} or side == shorter
    assert side < longer and (tile.frames, tile.precision, tile.vae_chunk) == (9, "fp8", 2)
    assert (tile.whole, tile.vae_tile and replace(plan, precision="bf16").vae_tile) == (
        (width, height),
        replace(tile, precision="bf16") if tile.vae_tile else None,
    )


@given(st.integers(1, 40), st.integers(0, 20), st.integers(0, 20), st.sampled_from([2, 3]))
def test_every_pixel_is_covered_with_weights_that_add_up_to_one(
    overlap: int, before: int, after: int, axis: int
) -> None:
    size = before + overlap + after
    shape = [2, 1, 3, 3]

    def tile(of: Array, start: int, length: int) -> Array:
        shape[axis] = length
        line = of[start : start + length].reshape(-1, *(1,) * (3 - axis))
        return np.broadcast_to(line, shape)

    def mixed(first: Array, second: Array) -> Array:
        made = vae.mixed(tile(first, 0, before + overlap), tile(second, before, overlap + after), axis, size)
        assert made.shape[axis] == size and made.dtype == np.float32
        return np.moveaxis(made, axis, -1)[0, 0, 0]

    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    np.testing.assert_array_equal(mixed(values, values), values)
    share = mixed(np.zeros(size, np.float32), np.ones(size, np.float32))
    assert (share[:before] == 0).all() and (share[before + overlap :] == 1).all()
    assert (np.diff(share) >= 0).all()
    np.testing.assert_allclose(
        mixed(np.ones(size, np.float32), np.zeros(size, np.float32)), 1 - share, atol=1e-6
    )


def models(config: Any, plan: Plan, weights: dict[str, Array]) -> tuple[Model, Model]:
    """The whole one, and the one with tiles."""
    tile, parts = tile_of(plan), {"vae": weights}
    executors = (EagerExecutor(config, shape, parts) for shape in (plan, tile))  # type: ignore[arg-type]
    whole, tiled = executors
    return Model(config, plan, whole, {}), Model(config, plan, tiled, {}, tile)


def latent_of(plan: Plan) -> Array:
    shape = (CHANNELS, plan.latent_frames, plan.latent_height, plan.latent_width)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def frames_of(plan: Plan) -> Array:
    shape = (3, plan.frames, plan.height, plan.width)
    return np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32)


def decoded(model: Model, latent: Array) -> Array:
    return np.concatenate(list(vae.decode(model, latent)), axis=1)


def differences(config: Any, plan: Plan, weights: dict[str, Array]) -> dict[str, Array]:
    """Root mean square by latent column along the cut side, relative to the whole result's deviation."""
    whole, tiled = models(config, plan, weights)
    results = {
        "decode": [decoded(model, latent_of(plan)) for model in (whole, tiled)],
        "encode": [vae.encode(model, frames_of(plan)) for model in (whole, tiled)],
    }
    made = {}
    for name, (want, got) in results.items():
        assert want.shape == got.shape and want.std() > 0.1
        off = np.moveaxis(got - want, 3 if plan.width > plan.height else 2, 0)
        columns = off.reshape(32, -1).astype(np.float64)
        made[name] = np.sqrt((columns**2).mean(1)) / want.std()
    return made


@pytest.mark.parametrize("plan", [WIDE, TALL], ids=["wide", "tall"])
def test_tiles_are_near_the_whole(plan: Plan) -> None:
    """Random weights: a trained VAE's attention adds less to its input."""
    for name, off in differences(SMALL, plan, random_weights(SMALL)).items():
        print(name, off.round(4))
        assert 1e-3 < off.mean() < 0.2
        assert off[8:24].mean() < 1.2 * off.mean(), "the seam is no worse than the rest"


def test_without_attention_tiles_differ_at_the_seam_alone() -> None:
    weights = random_weights()
    for name in weights:
        if ".proj." in name:
            weights[name] = np.zeros_like(weights[name])
    for name, off in differences(TINY, WIDE, weights).items():
        print(name, off)
        assert max(*off[:8], *off[24:]) < 1e-5 and 1e-5 < off.max() < 0.01


def test_segments_change_no_bit_and_pieces_come_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are read once and in order."""
    plan, results, reads = LEAST, [], []
    _, model = models(SMALL, plan, random_weights(SMALL))

    def read(start: int, stop: int) -> Array:
        reads.append((start, stop))
        return frames_of(plan)[:, start:stop]

    for segment in (20, 1):
        monkeypatch.setattr(vae, "SEGMENT", segment)
        pieces = list(vae.decode(model, latent_of(plan)))
        assert [piece.shape for piece in pieces] == [(3, n, plan.height, plan.width) for n in (1, 4, 4)]
        results.append((np.concatenate(pieces, axis=1), vae.encode_read(model, read, 9)))
    assert reads == 2 * [(0, 1), (1, 5), (5, 9)]
    (one, latent), (several, again) = results
    assert np.array_equal(one, several) and np.array_equal(latent, again) and one.std() > 0.1
    assert vae.encode(model, frames_of(plan)[:, :1]).shape == (CHANNELS, 1, 2, 20), "a picture"


def test_segments_are_of_whole_chunks() -> None:
    """Shapes alone: every chunk runs once in both tiles, at their size, for every division of the clip."""
    for chunk, count in ((1, 1), (1, 21), (1, 22), (1, 62), (2, 41), (20, 41), (24, 49)):
        plan = Plan(160, 16, 4 * (count - 1) + 1 if count > 1 else 5, vae_chunk=chunk)
        shapes = Shapes()
        model = Model(TINY, plan, shapes, {}, tile_of(plan))  # type: ignore[arg-type]
        latent = np.broadcast_to(np.float32(0), (CHANNELS, count, 2, 20))
        made = [piece.shape for piece in vae.decode(model, latent)]
        chunks = (count - 1) // chunk
        assert made == [(3, 1, 16, 160)] + chunks * [(3, 4 * chunk, 16, 160)]
        assert shapes.ran == {"vae_decode_first": 2} | ({"vae_decode_next": 2 * chunks} if chunks else {})


class Shapes:
    """An executor of zeros."""

    def __init__(self) -> None:
        self.ran: dict[str, int] = {}

    def run(self, network: Network, n: int, inputs: Any) -> tuple[Array, ...]:
        self.ran[network.name] = self.ran.get(network.name, 0) + 1
        return tuple(np.broadcast_to(np.float32(0), tensor.shape) for tensor in network.outputs)

    def fetch(self, array: Array) -> Callable[[], Array]:
        return lambda: array
