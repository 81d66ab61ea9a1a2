"""The generator against torch's own."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from trt_wan.errors import UsageError
from trt_wan.runtime.noise import CpuGenerator, GeneratorState, _box_muller

TOLERANCE = 1e-5  # torch's float32 log, sin and cos against numpy's
LATENT = (16, 21, 60, 104)


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def largest_difference(seed: int, *shapes: tuple[int, ...]) -> float:
    ours, theirs = CpuGenerator(seed), torch_generator(seed)
    worst = 0.0
    for shape in shapes:
        a, b = ours.randn(shape), torch.randn(shape, generator=theirs).numpy()
        assert a.shape == b.shape and a.dtype == b.dtype
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)))
    return worst


def test_a_draw_in_a_thread_is_the_same_draw() -> None:
    plain, other = CpuGenerator(7), CpuGenerator(7)
    shape = (16, 2, 60, 104)
    drawn = other.randn_beside(shape)
    np.testing.assert_array_equal(drawn(), plain.randn(shape))
    np.testing.assert_array_equal(other.randn((3,)), plain.randn((3,)))


@pytest.mark.parametrize("seed", [0, 42, 2**31 - 1])
@pytest.mark.parametrize("size", [1, 2, 5, 15, 16, 17, 31, 32, 100, 1000])
def test_one_draw(seed: int, size: int) -> None:
    assert largest_difference(seed, (size,)) <= TOLERANCE


def test_windows_continue_the_generator() -> None:
    assert largest_difference(1234, LATENT, LATENT) <= TOLERANCE


@pytest.mark.parametrize("seed", [7, 99])
def test_sizes_may_be_mixed(seed: int) -> None:
    """The kept value of an odd short draw outlives the long draws, whose redrawn tails move the engine on."""
    shapes = [
        (3,),
        (17,),
        (2, 4, 4),
        (1,),
        (0,),
        (100,),
        (5,),
        (16,),
        (2,),
        (3, 5, 7),
        (1,),
        (1,),
        (1000,),
        (15,),
    ]
    assert largest_difference(seed, *shapes) <= TOLERANCE


@pytest.mark.parametrize(
    "seed",
    [
        2**32 - 1,
        2**32,
        2**32 + 5,
        1125899906842624,
        0xDEADBEEFCAFEF00D,
        2**64 - 1,
        -1,
        -12345678901,
        -(2**63),
    ],
)
def test_seeds_of_64_bits(seed: int) -> None:
    assert largest_difference(seed, (5,), (100,)) <= TOLERANCE


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_torch_refuses(seed: int) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        torch_generator(seed)
    with pytest.raises(UsageError, match="64 bits") as caught:
        CpuGenerator(seed)
    assert f"--seed {seed % 2**64}," in caught.value.hint


def test_the_extreme_draws_stay_finite() -> None:
    """A fraction of 0 is a radius of 0; the largest, 1 - 2^-24, is the largest radius there is."""
    lowest, highest = np.full(16, 0xFF000000, np.uint32), np.full(16, 0xFFFFFFFF, np.uint32)
    values = _box_muller(np.concatenate((lowest, highest))).reshape(2, 16)
    assert (values[0] == 0).all()
    np.testing.assert_allclose(values[1, :8], math.sqrt(2 * 24 * math.log(2)), rtol=1e-6)
    np.testing.assert_allclose(values[1, 8:], 0, atol=TOLERANCE)


@pytest.mark.parametrize("before", [0, 1, 2, 15, 16, 100, 623, 624, 625, 5000])
def test_a_generator_goes_on_from_its_state(before: int) -> None:
    """Through JSON, whether or not a value of a pair is kept, and whether or not the engine is used up."""
    one = CpuGenerator(77)
    one.randn((before,))
    kept = json.dumps(asdict(one.state()))
    drawn = [one.randn(shape) for shape in ((3,), (2, 700), (1,), (16,))]
    two = CpuGenerator.from_state(GeneratorState(**json.loads(kept)))
    for shape, expected in zip(((3,), (2, 700), (1,), (16,)), drawn, strict=True):
        assert two.randn(shape).tobytes() == expected.tobytes()
    assert one.state() == two.state()


@pytest.mark.parametrize(
    "change", [{"engine": "00"}, {"engine": "g" * 4992}, {"position": 625}, {"kept": "a"}]
)
def test_a_state_that_is_none_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(CpuGenerator(0).state(), **change)  # type: ignore[arg-type]


def test_permutations_are_torchs() -> None:
    ours, theirs = CpuGenerator(8), torch_generator(8)
    for count in (1, 2, 13, 12, 300):
        expected = torch.randperm(count, generator=theirs).numpy()
        np.testing.assert_array_equal(ours.permutation(count), expected)
        np.testing.assert_allclose(
            ours.randn((5,)), torch.randn(5, generator=theirs).numpy(), atol=TOLERANCE, rtol=0
        )
