"""Tensors as files store them, decoded on the CPU: GGUF blocks, int8, rotated columns, deltas."""

from functools import reduce
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from quantised_weights import FORMS, decoded, quantised_file, random_blocks

from trt_wan.engines.int8 import rotated
from trt_wan.runtime.weights.stored import BLOCKS, CHUNK, ROTATIONS, Stored

# The largest error over the largest weight, of normal numbers; a tenth more than measured.
ERRORS = {
    **{"int8": 0.0043, "int8 rows": 0.0043, "int8 convrot": 0.0092, "Q8_0": 0.0043},
    **{"Q5_0": 0.041, "Q5_1": 0.027, "Q4_0": 0.089, "Q4_1": 0.055},
    **{"Q2_K": 0.27, "Q3_K": 0.27, "Q4_K": 0.056, "Q5_K": 0.027, "Q6_K": 0.034},  # by tests/k_quants.py
}


def normal(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_the_table_of_blocks_is_the_packages() -> None:
    sizes = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCKS}
    assert sizes == BLOCKS


@pytest.mark.parametrize("kind", FORMS)
def test_a_file_gives_the_numbers_it_was_made_from(kind: str, tmp_path: Path) -> None:
    """More rows than are decoded at a time; GGUF's as the gguf package decodes them."""
    weight = normal((1200, 512)) * np.linspace(0.5, 1, 1200, dtype=np.float32)[:, None]
    assert weight.size > 2 * CHUNK
    stored, values = quantised_file(tmp_path / "f", kind, {"w": weight})
    got = stored["w"].float32()
    assert got.dtype == np.float32 and got.shape == stored["w"].shape == weight.shape
    if kind in BLOCKS:
        np.testing.assert_array_equal(got, values["w"])
    error = np.abs(got - weight).max() / np.abs(weight).max()
    assert 0.8 * ERRORS[kind] < error < ERRORS[kind]
    np.testing.assert_allclose(stored["w"].rows([1199, 0, 7]), got[[1199, 0, 7]], rtol=0, atol=1e-6)
    raw = np.zeros(stored["w"].nbytes(2 * 512), np.uint8)
    stored["w"].read(stored["w"].nbytes(3 * 512), raw)
    assert raw.tobytes() == stored["w"].values[3:5].tobytes()


def hadamard(group: int) -> NDArray[np.float64]:
    """H of files_and_loras.md 7, as it is written there."""
    four = np.ones((4, 4)) - 2 * np.eye(4)[::-1]
    power = ROTATIONS.index(group) + 1
    return reduce(np.kron, [four] * power) / 2**power


@pytest.mark.parametrize("group", ROTATIONS)
def test_a_rotation_is_a_product_with_h_and_its_own_inverse(group: int) -> None:
    weight, matrix = normal((6, 3 * group)), hadamard(group)
    np.testing.assert_allclose(matrix @ matrix, np.eye(group), atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    got = rotated(weight, group)
    np.testing.assert_allclose(got, (weight.reshape(6, 3, group) @ matrix).reshape(6, -1), atol=3e-6)
    np.testing.assert_allclose(rotated(got, group), weight, atol=3e-6)


def test_rotated_weights_give_the_outputs_of_rotated_activations(tmp_path: Path) -> None:
    """The identity that int8 ConvRot is used by: x H (W H)^T = x W^T. A column with weights 100 times larger
    costs less with the rotation.
    """
    weight, x = normal((64, 512)), normal((8, 512), 1)
    stored = quantised_file(tmp_path / "f", "int8 convrot", {"w": weight})[0]["w"]
    assert stored.scales is not None
    turned = (x.reshape(8, 2, 256) @ hadamard(256)).reshape(8, -1)
    direct = turned @ (stored.values * stored.scales[:, None]).T
    np.testing.assert_allclose(x @ stored.float32().T, direct, atol=1e-3)
    weight[:, 3] *= 100
    errors = [
        np.sqrt(np.square(quantised_file(tmp_path / "g", kind, {"w": weight})[0]["w"].float32() - weight))
        for kind in ("int8 rows", "int8 convrot")
    ]
    assert errors[1].mean() < errors[0].mean() / 2


class Ramp:
    """Adds the row's number to the rows of an even number."""

    def add(self, values: NDArray[np.float32], first: int) -> None:
        for i, row in enumerate(values, first):
            row += i if i % 2 == 0 else 0


@pytest.mark.parametrize("kind", ["int8 convrot", "Q4_K"])
def test_a_delta_is_added_last_and_to_its_rows(kind: str, tmp_path: Path) -> None:
    weight = normal((1200, 512))
    plain = quantised_file(tmp_path / "f", kind, {"w": weight})[0]["w"]
    changed = Stored(**{**plain.__dict__, "delta": Ramp()})
    want = plain.float32()
    want[::2] += np.arange(0, 1200, 2, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(changed.float32(), want)
    np.testing.assert_allclose(changed.rows([1198, 5, 0]), want[[1198, 5, 0]], rtol=1e-6, atol=1e-6)


def test_the_scales_of_a_damaged_block_give_numbers_that_are_not_finite() -> None:
    """And no warning: a NaN in a weight is found later, by name."""
    blocks = random_blocks("Q4_K", (2, 256), np.random.default_rng(0))
    blocks[1, :2] = np.array([np.inf], np.float16).view(np.uint8)
    got = Stored(blocks, blocks="Q4_K", dims=(2, 256)).float32()
    assert np.isfinite(got[0]).all() and not np.isfinite(got[1]).all()


def test_a_shape_that_the_file_has_not(tmp_path: Path) -> None:
    """Leading dimensions of one, and rows of several dimensions."""
    values = normal((6, 256)).astype(np.float16)
    stored = Stored(values, dims=(1, 6, 256))
    assert stored.shape == (1, 6, 256) and stored.row == 6 * 256
    np.testing.assert_array_equal(stored.float32(), values.astype(np.float32)[None])
    blocks = random_blocks("Q8_0", (4, 96), np.random.default_rng(0))
    convolution = Stored(blocks, blocks="Q8_0", dims=(4, 32, 3))
    np.testing.assert_array_equal(convolution.float32(), decoded(blocks, "Q8_0").reshape(4, 32, 3))
    np.testing.assert_array_equal(convolution.rows([2]), convolution.float32()[2:3])
    assert Stored(np.array(3, np.float16)).float32() == 3
