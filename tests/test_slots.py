"""Slots taken, joined and blended: against numpy on the CPU, and on the GPU bit for bit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from on_gpu import require_gpu

from trt_wan.runtime.device import dot, finite
from trt_wan.runtime.device.kernels import compile_source
from trt_wan.runtime.device.slots import NAMES, SOURCE, runs
from trt_wan.runtime.executors import Executor
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.sampling.combine import combine_fp32

RNG = np.random.default_rng(0)


def on_cpu() -> Executor:
    return OnnxRuntimeExecutor(Path(), BoundWeights({}))


def on_gpu() -> Executor:
    gpu = require_gpu()
    gpu.reserve(1 << 28)
    return GpuExecutor(gpu, {}, None)  # type: ignore[arg-type]


@pytest.fixture(params=[on_cpu, on_gpu])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    make: Callable[[], Executor] = request.param
    yield make()


def array(slots: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return RNG.standard_normal((3, slots, 5, 7)).astype(dtype)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, "largest"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_one_number_that_is_not_finite_is_found(executor: Executor, dtype: Any, value: Any) -> None:
    numbers = array(9, dtype)
    assert executor.is_finite(executor.place(numbers)) and executor.is_finite(numbers)
    largest = ml_dtypes.finfo(dtype).max
    numbers[2, 8, 4, 6] = largest if value == "largest" else value
    assert executor.is_finite(executor.place(numbers)) == (value == "largest")


def test_integers_are_finite(executor: Executor) -> None:
    assert executor.is_finite(executor.place(np.full(5, -1, np.int64)))


@pytest.mark.parametrize("slots", [[0], [1, 2, 3], [3, 2, 2, 0, 1, 4], [4, 4, 4]])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("placed", [True, False])
def test_take(executor: Executor, slots: list[int], dtype: Any, placed: bool) -> None:
    whole = array(5, dtype)
    taken = executor.take(executor.place(whole) if placed else whole, slots)
    assert taken.shape == (3, len(slots), 5, 7) and taken.dtype == dtype
    np.testing.assert_array_equal(np.asarray(taken), np.stack([whole[:, k] for k in slots], axis=1))


def test_join(executor: Executor) -> None:
    arrays = [array(2), array(1), array(4)]
    joined = executor.join([executor.place(arrays[0]), *arrays[1:]])
    expected = np.empty((3, 7, 5, 7), np.float32)
    expected[:, :2], expected[:, 2:3], expected[:, 3:] = arrays
    np.testing.assert_array_equal(np.asarray(joined), expected)


@pytest.mark.parametrize("placed", [True, False])
def test_rows_are_put_in_place(executor: Executor, placed: bool) -> None:
    onto, other = (RNG.standard_normal((6, 5)).astype(np.float32) for _ in range(2))
    expected = np.concatenate((onto[:2], other[2:5], onto[5:]))
    given = executor.place(onto) if placed else onto
    made = executor.put_rows(given, executor.place(other), 2, 5)
    np.testing.assert_array_equal(np.asarray(made), expected)
    assert not placed or np.array_equal(np.asarray(given), expected)


def test_blend_adds_in_the_order_given_to_the_last_bit(executor: Executor) -> None:
    parts = [
        ([0, 1, 2], [1.0, 1 / 3, 0.1], array(3)),
        ([2, 1, 5], [0.9, 2 / 3, -1.0], array(3)),
        ([2, 2], [1e-3, 1e3], array(2)),
    ]
    blended = np.asarray(executor.blend(7, [(i, w, executor.place(a)) for i, w, a in parts]))
    assert blended.shape == (3, 7, 5, 7) and blended.dtype == np.float32
    for slot in range(7):
        terms = [
            (weight, part[:, k])
            for into, weights, part in parts
            for k, (to, weight) in enumerate(zip(into, weights, strict=True))
            if to == slot
        ]
        expected = combine_fp32(terms) if terms else np.zeros((3, 5, 7), np.float32)
        np.testing.assert_array_equal(blended[:, slot], expected)
    exact = 0.1 * parts[0][2][:, 2].astype(np.float64) + 0.9 * parts[1][2][:, 0]
    exact += 1e-3 * parts[2][2][:, 0].astype(np.float64) + 1e3 * parts[2][2][:, 1]
    np.testing.assert_allclose(blended[:, 2], exact, rtol=1e-5, atol=1e-4)


def test_dot(executor: Executor) -> None:
    x, y = array(40_000), array(40_000)  # more numbers than the threads of a launch
    exact = float(np.vdot(x.astype(np.float64), y.astype(np.float64)))
    for given in (x, y), (executor.place(x), executor.place(y)):
        assert executor.dot(*given) == pytest.approx(exact, rel=1e-12, abs=1e-6)
        assert executor.dot(*given) == executor.dot(*given)


def test_blend_goes_on_where_it_ended(executor: Executor) -> None:
    """A part at a time, so that no two parts are held at once."""
    parts = [([0, 1, 2], [1.0, 0.5, 0.1], array(3)), ([1, 2, 3], [0.5, 0.9, 1.0], array(3))]
    at_once, fused = np.asarray(executor.blend(4, parts)), None
    for part in parts:
        fused = executor.blend(4, [part], fused)
    np.testing.assert_array_equal(np.asarray(fused), at_once)


def test_runs() -> None:
    assert list(runs([3, 4, 5, 5, 0, 1])) == [(0, 3, 3), (3, 5, 1), (4, 0, 2)]
    assert list(runs([])) == []


def test_kernels_compile(nvrtc: None) -> None:
    for source, names in ((SOURCE, NAMES), (finite.SOURCE, finite.NAMES), (dot.SOURCE, dot.NAMES)):
        for capability in ((8, 0), (9, 0), (12, 0)):
            code = bytes(compile_source(source, capability).code)
            assert all(name.encode() in code for name in names)
