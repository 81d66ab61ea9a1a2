"""numbers.cuh against ml_dtypes: every bit pattern of 8 and 16 bits widened, floats rounded back.

Without a GPU only that it compiles, older GPUs included.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from on_gpu import require_gpu

from trt_wan.runtime.device.kernels import THREADS, Module, compile_source

TYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
STORED = ("bf16", "fp16", "e4m3")
SOURCE = "".join(
    f'extern "C" __global__ void widen_{name}(const {name}* x, float* y, int n) '
    "{ EACH(i, n) y[i] = load(x + i); }\n"
    for name in TYPES
) + "".join(
    f'extern "C" __global__ void store_{name}(const float* x, {name}* y, int n) '
    "{ EACH(i, n) store(y + i, x[i]); }\n"
    for name in STORED
)
NAMES = [f"widen_{name}" for name in TYPES] + [f"store_{name}" for name in STORED]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_numbers_compile(nvrtc: None, capability: tuple[int, int]) -> None:
    code = bytes(compile_source(SOURCE, capability).code)
    for name in NAMES:
        assert f".text.{name}".encode() + b"\0" in code


@pytest.fixture(scope="module")
def gpu() -> Any:
    gpu = require_gpu()
    gpu.reserve(1 << 26)
    return gpu


def run(gpu: Any, name: str, given: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    module = gpu.once(__name__, lambda: Module(gpu.device, SOURCE, NAMES))
    x, y = gpu.upload(given), gpu.empty(given.shape, dtype)
    module.launch(gpu.stream, name, 64, THREADS, x.address, y.address, np.int32(given.size))
    return np.asarray(gpu.download(y))


@pytest.mark.parametrize("name", TYPES)
def test_every_number_widens_as_in_numpy(gpu: Any, name: str) -> None:
    dtype = TYPES[name]
    bits = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
    got = run(gpu, f"widen_{name}", bits.view(dtype), np.dtype(np.float32))
    expected = bits.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(got, expected)  # NaN equals NaN
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(expected[number]))


@pytest.mark.parametrize("name", STORED)
def test_floats_round_as_in_numpy(gpu: Any, name: str) -> None:
    """Random sizes, every number of the type, ties between neighbours. E4M3 saturates; numpy's does not."""
    if name == "e4m3" and gpu.capability < (8, 9):
        pytest.skip("This GPU has no FP8.")
    dtype = TYPES[name]
    exact = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype).astype(np.float32)
    exact = np.unique(exact[np.isfinite(exact)])
    rng = np.random.default_rng(1)
    spread = rng.standard_normal(100_000, np.float32) * np.exp2(rng.uniform(-30, 15, 100_000))
    given = np.concatenate([exact, exact[1:] / 2 + exact[:-1] / 2, spread.astype(np.float32), [np.nan]])
    given = given.astype(np.float32)
    limit = np.float32(448 if name == "e4m3" else np.inf)
    with np.errstate(over="ignore"):
        expected = given.clip(-limit, limit).astype(dtype)
    got = run(gpu, f"store_{name}", given, dtype)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
