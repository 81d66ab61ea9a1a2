"""Block-sparse attention on the CPU from q, k and v to the result: the kernels of select.cu and the
attention for Hopper, against numpy.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from block_choice import order_of, sparse_attention
from hopper_on_cpu import HEADER, gpu_on_cpu
from kernels_on_cpu import CpuKernels

from trt_wan.runtime.segments.attention import select
from trt_wan.runtime.segments.attention.sparse import Sparse

BF16 = np.dtype(ml_dtypes.bfloat16)
HEADS, HEAD_DIM = 2, 128
GUARD = 64  # elements behind the result


class Module:
    """In place of kernels.Module."""

    def __init__(self, folder: Path, source: str, names: Any, macros: Any) -> None:
        lines = "".join(f"#define {name} {value}\n" for name, value in {**macros, "LATE": 0}.items())
        (folder / "choice").mkdir()
        self._kernels = CpuKernels(lines + HEADER + select.SOURCE, folder / "choice")

    def launch(self, stream: Any, name: str, grid: Any, threads: int, *arguments: Any) -> None:
        self._kernels.launch(name, grid, threads, True, *arguments)


def inputs(tokens: int) -> list[Any]:
    q, k, v = np.random.default_rng(tokens).standard_normal((3, HEADS, tokens, HEAD_DIM), np.float32)
    return [x.astype(BF16) for x in (q * np.float32(HEAD_DIM**-0.5), k + 1, v)]


def attend(
    given: list[Any], keep: float, grid: tuple[int, int, int], folder: Path, patch: pytest.MonkeyPatch
) -> Any:
    """float32 [tokens, heads * head_dim], by the kernels. `grid`: slots, rows and columns of tokens."""
    gpu, kept_alive = gpu_on_cpu(folder, patch), []
    patch.setattr(select, "Module", Module)

    def allocate(size: int) -> Any:
        kept_alive.append(np.zeros(size, np.uint8))
        return type("Buffer", (), {"handle": kept_alive[-1].ctypes.data})()

    gpu.allocate = allocate
    gpu.view = lambda address, shape, dtype: kept_alive[-1].view(dtype).reshape(shape)
    gpu.write = lambda to, values: to.__setitem__(slice(None), values)
    tokens, order = given[0].shape[1], np.array(order_of(*grid), np.int32)
    segment = Sparse(gpu, HEADS, tokens, HEAD_DIM, order, grid[1] * grid[2])
    scratch = np.full(segment.scratch_bytes + 256, 0xFF, np.uint8)
    segment.start(scratch.ctypes.data + -scratch.ctypes.data % 256)
    share, out = np.array([keep], np.float32), np.full(tokens * HEADS * HEAD_DIM + GUARD, np.nan, BF16)
    names = dict(zip("qkv", given, strict=True)) | {"keep": share, "attended": out}
    segment.enqueue({name: x.ctypes.data for name, x in names.items()})
    assert np.isnan(out[-GUARD:].astype(np.float32)).all(), "wrote behind its result"
    return out[:-GUARD].reshape(tokens, -1).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize(
    ("grid", "keep"),
    [((1, 3, 4), 0.5), ((5, 10, 12), 0.01), ((5, 10, 12), 0.6), ((5, 10, 12), 1.0), ((5, 16, 20), 0.4)],
)
def test_block_sparse_attention_against_numpy(
    grid: tuple[int, int, int], keep: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(int(np.prod(grid)))
    got, expected = attend(given, keep, grid, tmp_path, monkeypatch), sparse_attention(*given, keep, *grid)
    assert np.linalg.norm(got - expected) <= 5e-2 * np.linalg.norm(expected)


@pytest.mark.long
def test_numbers_that_are_not_finite_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 has no NaN: rounding would hide one. Most blocks count by their means here."""
    grid = 5, 10, 12
    q, k, v = inputs(600)
    q[0, 77, 5] = k[1, 598, 5] = np.nan
    v[0, 301, 6] = np.inf
    got = attend([q, k, v], 0.01, grid, tmp_path, monkeypatch).reshape(600, HEADS, HEAD_DIM)
    wanted = np.zeros(got.shape, bool)
    wanted[77, 0] = wanted[:, 0, 6] = wanted[:, 1] = True
    assert (np.isfinite(got) == ~wanted).all()
