"""The kernels of convert.cu and gguf_blocks.cuh on the CPU: the bits of numpy and of the gguf package."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernels_on_cpu import CpuKernels
from quantised_weights import extreme_blocks, random_blocks
from weight_oracle import converted, int8_rows, plain, quantised, rotated

from trt_wan.runtime.weights.convert import SOURCE, SOURCES, TARGETS
from trt_wan.runtime.weights.stored import BLOCKS, ROTATIONS

SCALED = ("float8_e4m3fn", "float8_e5m2", "int8")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    return CpuKernels(SOURCE, tmp_path_factory.mktemp("kernels"))


def same(got: Any, want: Any, what: str) -> None:
    """Bits, but any NaN is a NaN."""
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[want.dtype.itemsize]
    a, b = got.view(kind).reshape(-1), np.ascontiguousarray(want).view(kind).reshape(-1)
    both = np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32))
    wrong = np.flatnonzero((a != b) & ~both.reshape(-1))
    assert not wrong.size, f"{what}: {wrong.size} of {a.size} differ, the first at {wrong[0]}"


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_decoded_as_by_the_gguf_package(kernels: CpuKernels, kind: str) -> None:
    rng = np.random.default_rng(0)
    for blocks in (random_blocks(kind, (7, 1024), rng), extreme_blocks(kind, rng)):
        want = plain(blocks, kind)
        got = np.full(want.shape, 7, np.float32)
        kernels.launch(f"convert_{kind}_to_float32", 3, 256, False, blocks, 0, got, *want.shape)
        same(got, want, kind)


def stored_numbers(source: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    dtype = np.dtype(source)
    if dtype.itemsize == 1:
        values = rng.integers(0, 256, shape, np.uint8)
        if source != "int8":  # no NaN and no Inf
            values[~np.isfinite(values.view(dtype).astype(np.float32))] = 0x3C
        return values.view(dtype)
    wide = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 8, shape))
    return wide.astype(np.float32).astype(dtype)


@pytest.mark.parametrize("source", SOURCES)
def test_numbers_are_converted_as_by_numpy(kernels: CpuKernels, source: str) -> None:
    rng, shape = np.random.default_rng(1), (5, 300)
    values = stored_numbers(source, shape, rng)
    for scales in (None, rng.uniform(1e-4, 0.03, 5).astype(np.float32)) if source in SCALED else (None,):
        for target in TARGETS:
            want = converted(values, scales, np.dtype(target))
            got = np.zeros(shape, want.dtype)
            factors = 0 if scales is None else scales
            kernels.launch(f"convert_{source}_to_{target}", 2, 256, False, values, factors, got, *shape)
            same(got, want, f"{source} to {target}")


@pytest.mark.parametrize("source", SOURCES)
def test_numbers_are_quantised_as_by_numpy(kernels: CpuKernels, source: str) -> None:
    rng, shape = np.random.default_rng(2), (3, 300)
    values = stored_numbers(source, shape, rng).copy()
    values[1] = 0
    scales = rng.uniform(1e-4, 0.03, shape[0]).astype(np.float32) if source in SCALED else None
    want, want_scales = quantised(values, scales)
    got, got_scales = np.zeros(shape, ml_dtypes.float8_e4m3fn), np.zeros(shape[0], np.float32)
    factors = 0 if scales is None else scales
    kernels.launch(f"quantise_{source}", 2, 256, True, values, factors, got, got_scales, *shape)
    same(got_scales, want_scales, f"scales of {source}")
    same(got, want, source)


def test_numbers_are_quantised_to_int8_as_by_numpy(kernels: CpuKernels) -> None:
    """A number that is not finite shows in the scale."""
    values = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32) * np.float32(3)
    values[1] = 0
    codes, scales = np.zeros(values.shape, np.int8), np.zeros(5, np.float32)
    kernels.launch("quantise_to_int8", 2, 256, True, values, codes, scales, *values.shape)
    want, want_scales = int8_rows(values)
    same(scales, want_scales, "scales")
    same(codes, want, "codes")
    assert np.abs(codes[[0, 2, 3, 4]]).max(axis=1).tolist() == [127] * 4
    for value in (np.nan, np.inf):
        values[3, 300] = value
        kernels.launch("quantise_to_int8", 2, 256, True, values, codes, scales, *values.shape)
        assert np.isfinite(scales).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("group", ROTATIONS)
def test_columns_are_rotated_as_by_numpy(kernels: CpuKernels, group: int) -> None:
    rng = np.random.default_rng(3)
    for numbers in (3 * 1024, 1024 + group):  # the last block of threads has few
        values = (rng.standard_normal(numbers) * np.exp2(rng.integers(-20, 20, numbers))).astype(np.float32)
        got = np.concatenate([values, np.full(8, 7, np.float32)])
        kernels.launch("rotate", 2, 256, True, got, numbers, group)
        same(got[:numbers], rotated(values, group), str(group))
        assert (got[numbers:] == 7).all()
