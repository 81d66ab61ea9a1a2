"""Block-sparse attention on the CPU from q, k and v to the result: the kernels of select.cu, skipped.cu and
the attention for Hopper, against numpy. C++ stands in for attention.cuh, which is written in PTX.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from block_choice import order_of, sparse_attention
from hopper_on_cpu import HEADER, gpu_on_cpu, without_instructions
from kernels_on_cpu import CpuKernels

from trt_wan.runtime.device.kernels import read_source
from trt_wan.runtime.segments.attention import select
from trt_wan.runtime.segments.attention.sparse import Sparse

BF16 = np.dtype(ml_dtypes.bfloat16)
HEADS, HEAD_DIM = 2, 128
GUARD = 64  # elements behind the result
ATTENTION = r"""
constexpr float LOG2_E = 1.4426950408889634f;
float power_of_2(float x) { return std::exp2(x); }
template <int WIDTH>
u32 chunk_offset(int row, int chunk) { return row * (WIDTH * 2) + ((chunk ^ (row & 7)) << 4); }
void end_of_copies() {}
template <int IN_FLIGHT> void wait_for_copies() {}
void copy_listed(u32 to, const bf16* means, const int* list, int first, int end) {
    for (int i = threadIdx.x; i < TILE * 16; i += WARPS * 32) {
        const int row = i / 16, chunk = i % 16;
        u8* there = shared_bytes + to + chunk_offset<128>(row, chunk);
        if (first + row < end) memcpy(there, means + (i64)list[first + row] * 128 + chunk * 8, 16);
        else memset(there, 0, 16);
    }
}
template <int VALUE> struct Running {
    float out[VALUE / 8][4] = {}, most[2], sum[2] = {};
    void clear(float least) { most[0] = most[1] = least; }
    float row_sum(int half) const {
        const float two = sum[half] + __shfl_xor_sync(~0u, sum[half], 1);
        return two + __shfl_xor_sync(~0u, two, 2);
    }
};
template <class Half, int N, int KEY, int VALUE>
void attend_tile(const u32 (&q)[KEY / 16][4], u32 keys, u32 values, int valid, Running<VALUE>& r) {
    auto at = [](u32 start, int row, int channel) {
        const u32 chunk = start + chunk_offset<KEY>(row, channel / 8);
        return widen(((const bf16*)(shared_bytes + chunk))[channel % 8]);
    };
    for (int half = 0; half < 2; ++half) {
        float query[KEY], scores[N];
        for (int d = 0; d < KEY / 16; ++d)
            for (int i = half; i < 4; i += 2)
                for (int other = 0; other < 4; ++other) {
                    const u32 pair = of_thread(threadIdx.x / 4 * 4 + other, q[d][i]);
                    float* const to = query + d * 16 + i / 2 * 8 + other * 2;
                    to[0] = widen(bf16{(u16)pair}), to[1] = widen(bf16{(u16)(pair >> 16)});
                }
        float most = r.most[half];
        for (int n = 0; n < N; ++n) {
            scores[n] = n < valid ? 0 : -infinity();
            for (int c = 0; c < KEY && n < valid; ++c) scores[n] += query[c] * at(keys, n, c);
            most = fmaxf(most, scores[n]);
        }
        const float shrink = std::exp(r.most[half] - most);
        r.most[half] = most, r.sum[half] *= shrink;
        for (int n = 0; n < VALUE / 8; ++n) r.out[n][2 * half] *= shrink, r.out[n][2 * half + 1] *= shrink;
        for (int n = 0; n < N; ++n) {
            const float weight = std::exp(scores[n] - most);
            if (n / 2 % 4 == threadIdx.x % 4) r.sum[half] += weight;  // four threads share a row's keys
            for (int c = 0; c < VALUE / 4; ++c) {
                const int channel = c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
                r.out[c / 2][2 * half + c % 2] += weight * at(values, n, channel);
            }
        }
    }
}
struct Bf16;
"""


class Module:
    """In place of kernels.Module."""

    def __init__(self, folder: Path, source: str, names: Any, macros: Any) -> None:
        skipped = without_instructions(read_source(select.__package__, "skipped.cu"))
        sizes, kernel = skipped.split("static_assert", 1)
        text = select.SELECT + sizes + ATTENTION + "static_assert" + kernel
        lines = "".join(f"#define {name} {value}\n" for name, value in {**macros, "LATE": 0}.items())
        (folder / "choice").mkdir()
        self._kernels = CpuKernels(lines + HEADER + text, folder / "choice")

    def launch(
        self, stream: Any, name: str, grid: Any, threads: int, *arguments: Any, shared: int = 0
    ) -> None:
        self._kernels.launch(name, grid, threads, True, *arguments)


@pytest.mark.long
@pytest.mark.parametrize(
    ("grid", "keep"),
    [((1, 3, 4), 0.5), ((5, 10, 12), 0.01), ((5, 10, 12), 0.6), ((5, 10, 12), 1.0), ((5, 16, 20), 0.4)],
)
def test_block_sparse_attention_against_numpy(
    grid: tuple[int, int, int], keep: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots, rows and columns, of which the blocks are."""
    tokens = int(np.prod(grid))
    q, k, v = np.random.default_rng(tokens).standard_normal((3, HEADS, tokens, HEAD_DIM), np.float32)
    given = [x.astype(BF16) for x in (q * np.float32(HEAD_DIM**-0.5), k + 1, v)]
    gpu, kept_alive = gpu_on_cpu(tmp_path, monkeypatch), []
    monkeypatch.setattr(select, "Module", Module)

    def allocate(size: int) -> Any:
        kept_alive.append(np.zeros(size, np.uint8))
        return type("Buffer", (), {"handle": kept_alive[-1].ctypes.data})()

    gpu.allocate = allocate
    gpu.view = lambda address, shape, dtype: kept_alive[-1].view(dtype).reshape(shape)
    gpu.write = lambda to, values: to.__setitem__(slice(None), values)
    order = np.array(order_of(*grid), np.int32)
    segment = Sparse(gpu, HEADS, tokens, HEAD_DIM, order, grid[1] * grid[2])
    scratch = np.full(segment.scratch_bytes + 256, 0xFF, np.uint8)
    segment.start(scratch.ctypes.data + -scratch.ctypes.data % 256)
    share, out = np.array([keep], np.float32), np.full(tokens * HEADS * HEAD_DIM + GUARD, np.nan, BF16)
    names = dict(zip("qkv", given, strict=True)) | {"keep": share, "attended": out}
    segment.enqueue({name: x.ctypes.data for name, x in names.items()})
    got, expected = out[:-GUARD].reshape(tokens, -1).astype(np.float32), sparse_attention(*given, keep, *grid)
    assert np.isnan(out[-GUARD:].astype(np.float32)).all(), "wrote behind its result"
    assert np.linalg.norm(got - expected) <= 5e-2 * np.linalg.norm(expected)
