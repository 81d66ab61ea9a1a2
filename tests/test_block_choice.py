"""The choice of key blocks for block-sparse attention: the kernels of select.cu on the CPU, against numpy."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from block_choice import QUERIES, chosen
from kernels_on_cpu import CpuKernels

from trt_wan.runtime.segments.attention.select import BLOCK, GROUP, SOURCE, macros

HEAD_DIM = 16


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    defined = "".join(f"#define {name} {value}\n" for name, value in macros(HEAD_DIM).items())
    return CpuKernels(defined + SOURCE, tmp_path_factory.mktemp("kernels"))


def numbers(shape: tuple[int, ...], seed: int) -> Any:
    """Few whole numbers: every mean is exact in float32, and many scores are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(ml_dtypes.bfloat16)


def by_kernels(kernels: CpuKernels, q: Any, k: Any, keep: float, first: int) -> list[list[list[int]]]:
    """The blocks that each row of each head keeps."""
    heads, tokens, _ = q.shape
    rows, blocks, always = -(-tokens // QUERIES), -(-tokens // BLOCK), -(-first // BLOCK)
    pooled = np.full(heads * HEAD_DIM * (rows + blocks), np.nan, np.float32)
    means = np.full((2, heads, blocks, HEAD_DIM), np.nan, ml_dtypes.bfloat16)
    partial, v = np.full((2, heads, blocks, 3, HEAD_DIM), np.nan, np.float32), q[:, ::-1].copy()
    order = np.random.default_rng(2).permutation(tokens).astype(np.int32)
    given = [np.empty_like(x) for x in (q, k, v)]
    for before, x in zip(given, (q, k, v), strict=True):
        before[:, order] = x
    made = order, pooled, means, partial, tokens, heads
    kernels.launch("pool_blocks", heads * (rows + 2 * blocks), 256, True, *given, *made)
    for got, parts, x in zip(means, partial, (k, v), strict=True):
        each = [x[:, at : at + BLOCK].astype(np.float32) for at in range(0, tokens, BLOCK)]
        wanted = np.stack([y.mean(axis=1) for y in each], axis=1)
        assert (got == wanted.astype(ml_dtypes.bfloat16)).all()
        wanted = np.stack([(y.sum(1), y.min(1), y.max(1)) for y in each]).transpose(2, 0, 1, 3)
        assert (parts == wanted)[:, :, : 1 if x is k else 3].all()
    ranks = np.full((heads * rows, blocks), 7, np.uint32)
    grid = heads * -(-rows // GROUP) * -(-blocks // 256)
    kernels.launch("rank_blocks", grid, 256, True, pooled, ranks, rows, blocks, always)
    listed, count, share = (
        np.full((heads * rows, blocks), -1, np.int32),
        np.full(heads * rows, -1, np.int32),
        np.float32([keep]),
    )
    marks = np.full((heads * rows, -(-blocks // BLOCK) * BLOCK // 32), 7, np.uint32)
    chosen_, sizes = (ranks, listed, count, marks, share), (rows, blocks, always, heads)
    kernels.launch("choose_blocks", -(-heads * rows // 2), 64, True, *chosen_, *sizes)
    bits = np.unpackbits(marks.view(np.uint8), axis=1, bitorder="little").astype(bool)
    for row, n, marked in zip(listed, count, bits, strict=True):
        assert sorted(row[:n]) == np.flatnonzero(marked[:blocks]).tolist() and marked[blocks:].all()
    made = [row[:n].tolist() for row, n in zip(listed, count, strict=True)]
    return [made[head * rows : (head + 1) * rows] for head in range(heads)]


@pytest.mark.parametrize(
    ("heads", "tokens", "first", "keep"),
    [
        (2, 5 * BLOCK, 100, 0.5),
        (1, 34 * BLOCK + 1, 2 * BLOCK + 1, 0.3),  # more blocks than a warp has threads, the last of one token
        (3, 3 * BLOCK - 7, 1, 1.0),
        (1, 60, 20, 0.5),
        (2, 7 * BLOCK, 3 * BLOCK, 0.01),  # no more than are always kept
        (1, 7 * BLOCK, 2 * BLOCK + 1, 0.01),  # the reference's blocks end within a block of queries
    ],
)
def test_the_blocks_are_those_of_numpy(
    kernels: CpuKernels, heads: int, tokens: int, first: int, keep: float
) -> None:
    q, k = numbers((heads, tokens, HEAD_DIM), 0), numbers((heads, tokens, HEAD_DIM), 1)
    wanted = chosen(q, k, keep, first)
    made = by_kernels(kernels, q, k, keep, first)
    assert made == [[np.flatnonzero(row).tolist() for row in head] for head in wanted]


def test_equal_scores_keep_the_lower_numbers(kernels: CpuKernels) -> None:
    q = numbers((1, 8 * BLOCK, HEAD_DIM), 0)
    (made,) = by_kernels(kernels, q, np.zeros_like(q), 0.5, 1)
    assert made[0] == [0, 1, 2, 7] and made[2] == [0, 3, 4, 7] and made[5] == [0, 1, 2, 7]
