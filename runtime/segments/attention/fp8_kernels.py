"""Around FP8 attention: keys without their mean, q, k and v in E4M3, and what is to be put right afterwards.

Subtracting the mean over the tokens from every key adds the same number to all scores of a query, so the
softmax stays as it is, and channels that are far from zero in every key no longer take up E4M3's range.
Means are summed in a fixed order: the same input gives the same bits.

Tensors are [heads, tokens, dim]; `dim` is a multiple of 8, and a thread moves 8 channels (16 bytes of bf16)
at a time. What is called `sage` is the format of cuDNN frontend's block-sparse FP8 kernel: one scale for each
query, one for each 16 keys, one for each channel of v, and v stored [heads, dim, tokens].
"""

from typing import Any

import numpy as np

from trt_wan.engines.gpu import E4M3_MAX
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import compile_source

THREADS = 256
CHUNK = 256  # tokens that one block of threads reduces
TILE = 64  # tokens of v that one block transposes
KEY_GROUP = 16  # keys with one scale, in the sage format

SOURCE = r"""
typedef unsigned char fp8;  // E4M3
typedef unsigned short bf16;
typedef long long i64;

struct __align__(16) Bf16x8 { bf16 x[8]; };
struct __align__(8) Fp8x8 { fp8 x[8]; };

__device__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }
__device__ bf16 narrow(float x) {  // to nearest, ties to even; no NaN comes here
    unsigned bits = __float_as_uint(x);
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
__device__ fp8 to_fp8(float x) {
    unsigned short pair = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
#endif
    return pair & 0xFF;
}
__device__ float from_fp8(fp8 x) {
    float out = 0;
#if __CUDA_ARCH__ >= 890
    unsigned halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)x));
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"((unsigned short)(halves & 0xFFFF)));
#endif
    return out;
}

// Sums of a chunk of tokens, or largest magnitudes, per channel: partial [heads, chunks, dim].
// Grid (chunks, heads). The rows of a thread are added first, then the threads of a channel in their order.
template <bool PEAK> __device__ float both(float a, float b) { return PEAK ? fmaxf(a, fabsf(b)) : a + b; }
template <bool PEAK> __device__ void reduce_chunk(const bf16* x, float* partial, int tokens, int dim) {
    __shared__ float shared[8][256];
    int lanes = dim / 8, rows = blockDim.x / lanes, lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
    int stop = min(tokens, (int)(blockIdx.x + 1) * 256);
    const bf16* head = x + (i64)blockIdx.y * tokens * dim;
    float sum[8] = {};
    if (row < rows)
        for (int token = blockIdx.x * 256 + row; token < stop; token += rows) {
            Bf16x8 values = *(const Bf16x8*)(head + (i64)token * dim + lane * 8);
            for (int j = 0; j < 8; ++j) sum[j] = both<PEAK>(sum[j], widen(values.x[j]));
        }
    for (int j = 0; j < 8; ++j) shared[j][threadIdx.x] = sum[j];
    __syncthreads();
    for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
        float total = 0;
        for (int i = 0; i < rows; ++i)
            total = both<PEAK>(total, shared[channel % 8][i * lanes + channel / 8]);
        partial[((i64)blockIdx.y * gridDim.x + blockIdx.x) * dim + channel] = total;
    }
}
extern "C" __global__ void sum_chunks(const bf16* x, float* partial, int tokens, int dim) {
    reduce_chunk<false>(x, partial, tokens, dim);
}
extern "C" __global__ void peak_chunks(const bf16* x, float* partial, int tokens, int dim) {
    reduce_chunk<true>(x, partial, tokens, dim);
}

// One block per head: all its chunks, times `factor`.
template <bool PEAK>
__device__ void reduce_all(const float* partial, float* out, int chunks, int dim, float factor) {
    for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
        float total = 0;
        for (int i = 0; i < chunks; ++i)
            total = both<PEAK>(total, partial[((i64)blockIdx.x * chunks + i) * dim + channel]);
        out[blockIdx.x * dim + channel] = PEAK ? fmaxf(total * factor, 1e-12f) : total * factor;
    }
}
extern "C" __global__ void mean(const float* partial, float* out, int chunks, int dim, float factor) {
    reduce_all<false>(partial, out, chunks, dim, factor);
}
extern "C" __global__ void peak(const float* partial, float* out, int chunks, int dim, float factor) {
    reduce_all<true>(partial, out, chunks, dim, factor);
}

// (x - mean) * factor; `mean` [heads, dim] may be null. Grid (any, heads).
extern "C" __global__ void quantize(const bf16* x, const float* mean, fp8* out,
                                    int tokens, int dim, float factor) {
    int vectors = tokens * (dim / 8);
    i64 head = (i64)blockIdx.y * vectors;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        Bf16x8 values = ((const Bf16x8*)x)[head + i];
        const float* shift = mean ? mean + blockIdx.y * dim + i % (dim / 8) * 8 : nullptr;
        Fp8x8 result;
        for (int j = 0; j < 8; ++j)
            result.x[j] = to_fp8((widen(values.x[j]) - (shift ? shift[j] : 0.0f)) * factor);
        ((Fp8x8*)out)[head + i] = result;
    }
}

// bf16 of x * factor, `vectors` of 8.
extern "C" __global__ void dequantize(const fp8* x, bf16* out, int vectors, float factor) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        Fp8x8 values = ((const Fp8x8*)x)[i];
        Bf16x8 result;
        for (int j = 0; j < 8; ++j) result.x[j] = narrow(from_fp8(values.x[j]) * factor);
        ((Bf16x8*)out)[i] = result;
    }
}

// The sage format, dim 128: 16 threads have one row. `padded` tokens is `tokens` up to a multiple of 128;
// scales are written for all of them (0 where there is no token), q and k only where there are tokens.

__device__ float largest(const float* x) {
    float most = 0;
    for (int j = 0; j < 8; ++j) most = fmaxf(most, fabsf(x[j]));
    return most;
}

// Grid (padded / 16, heads): 16 queries a block.
extern "C" __global__ void sage_queries(const bf16* q, fp8* out, float* scale, int tokens, int padded) {
    int token = blockIdx.x * 16 + threadIdx.x / 16, lane = threadIdx.x % 16;
    i64 at = (((i64)blockIdx.y * tokens + token) * 128 + lane * 8) / 8;
    float values[8] = {};
    if (token < tokens) {
        Bf16x8 loaded = ((const Bf16x8*)q)[at];
        for (int j = 0; j < 8; ++j) values[j] = widen(loaded.x[j]);
    }
    float most = largest(values);
    for (int step = 8; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    float s = fmaxf(most / 448.0f, 1e-12f);
    if (lane == 0) scale[(i64)blockIdx.y * padded + token] = token < tokens ? s : 0.0f;
    if (token >= tokens) return;
    Fp8x8 result;
    for (int j = 0; j < 8; ++j) result.x[j] = to_fp8(values[j] / s);
    ((Fp8x8*)out)[at] = result;
}

// Grid (padded / 16, heads): the 16 keys of one scale a block.
extern "C" __global__ void sage_keys(const bf16* k, const float* mean, fp8* out, float* scale, int tokens) {
    __shared__ float warps[8];
    int token = blockIdx.x * 16 + threadIdx.x / 16, lane = threadIdx.x % 16;
    i64 at = (((i64)blockIdx.y * tokens + token) * 128 + lane * 8) / 8;
    float values[8] = {};
    if (token < tokens) {
        Bf16x8 loaded = ((const Bf16x8*)k)[at];
        for (int j = 0; j < 8; ++j) values[j] = widen(loaded.x[j]) - mean[blockIdx.y * 128 + lane * 8 + j];
    }
    float most = largest(values);
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
    __syncthreads();
    float s = fmaxf(largest(warps) / 448.0f, 1e-12f);
    if (threadIdx.x == 0)
        scale[(i64)blockIdx.y * gridDim.x + blockIdx.x] = blockIdx.x * 16 < tokens ? s : 0.0f;
    if (token >= tokens) return;
    Fp8x8 result;
    for (int j = 0; j < 8; ++j) result.x[j] = to_fp8(values[j] / s);
    ((Fp8x8*)out)[at] = result;
}

// v [heads, tokens, 128] to out [heads, 128, padded], zeros behind the last token. Grid (padded / 64, heads).
extern "C" __global__ void sage_values(const bf16* v, const float* scale, fp8* out, int tokens, int padded) {
    __shared__ __align__(16) fp8 tile[128][68];  // 4 bytes more than tokens: channels in different banks
    int lane = threadIdx.x % 16;
    for (int row = threadIdx.x / 16; row < 64; row += 16) {
        int token = blockIdx.x * 64 + row;
        for (int j = 0; j < 8; ++j) tile[lane * 8 + j][row] = 0;
        if (token < tokens) {
            Bf16x8 values = ((const Bf16x8*)v)[((i64)blockIdx.y * tokens + token) * 16 + lane];
            for (int j = 0; j < 8; ++j)
                tile[lane * 8 + j][row] =
                    to_fp8(widen(values.x[j]) / scale[blockIdx.y * 128 + lane * 8 + j]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 128 * 16; i += blockDim.x) {  // 4 tokens at a time
        i64 at = ((i64)blockIdx.y * 128 + i / 16) * padded + blockIdx.x * 64 + i % 16 * 4;
        *(unsigned*)(out + at) = *(const unsigned*)(&tile[i / 16][i % 16 * 4]);
    }
}

// `extra` keys of zero took part in the softmax, each with weight exp(0), and their v is zero: what is left
// is to divide by the share of the others. `lse` [heads, tokens] is the logarithm of the sum with them.
// out [tokens, heads, 128]; 16 threads a row, grid as many rows as there are.
extern "C" __global__ void without_extra(bf16* out, const float* lse, int tokens, int heads, float extra) {
    int row = blockIdx.x * 16 + threadIdx.x / 16;
    if (row >= tokens * heads) return;
    float share = extra * expf(-lse[(i64)(row % heads) * tokens + row / heads]);
    if (share < 0.0009765625f) return;  // 2^-10, a quarter of bf16's last bit
    Bf16x8* at = (Bf16x8*)out + (i64)row * 16 + threadIdx.x % 16;
    Bf16x8 values = *at;
    for (int j = 0; j < 8; ++j) values.x[j] = narrow(widen(values.x[j]) / (1.0f - share));
    *at = values;
}
"""

NAMES = (
    "sum_chunks",
    "peak_chunks",
    "mean",
    "peak",
    "quantize",
    "dequantize",
    "sage_queries",
    "sage_keys",
    "sage_values",
    "without_extra",
)


def compile_for(major: int, minor: int) -> Any:
    """The kernels' code for GPUs of a compute capability; needs no GPU."""
    return compile_source(SOURCE, major, minor)


class Fp8Kernels:
    """The kernels for one shape, on the Gpu's stream. Arguments are device addresses and numbers."""

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        self.heads, self.tokens, self.head_dim = heads, tokens, head_dim
        self.chunks = -(-tokens // CHUNK)
        self._stream = gpu.stream
        module = compile_for(*gpu.capability)
        self._kernels = {name: module.get_kernel(name) for name in NAMES}

    @property
    def partial_bytes(self) -> int:
        """What `key_means` and `value_scales` want for what chunks of tokens give."""
        return self.heads * self.chunks * self.head_dim * 4

    def key_means(self, k: int, partial: int, means: int) -> None:
        """float32 [heads, head_dim]."""
        self._reduce("sum_chunks", "mean", k, partial, means, 1 / self.tokens)

    def value_scales(self, v: int, partial: int, scales: int) -> None:
        """float32 [heads, head_dim]: each channel's largest magnitude over E4M3's."""
        self._reduce("peak_chunks", "peak", v, partial, scales, 1 / E4M3_MAX)

    def quantize(self, x: int, out: int, factor: float, means: int = 0) -> None:
        """E4M3 of (x - means) * factor."""
        shape = np.int32(self.tokens), np.int32(self.head_dim)
        blocks = -(-self.tokens * self.head_dim // (8 * THREADS))
        self._launch("quantize", (blocks, self.heads), x, means, out, *shape, np.float32(factor))

    def dequantize(self, x: int, out: int, factor: float) -> None:
        vectors = self.heads * self.tokens * self.head_dim // 8
        grid = (-(-vectors // THREADS), 1)
        self._launch("dequantize", grid, x, out, np.int32(vectors), np.float32(factor))

    def sage_queries(self, q: int, out: int, scales: int, padded: int) -> None:
        grid = (padded // 16, self.heads)
        self._launch("sage_queries", grid, q, out, scales, np.int32(self.tokens), np.int32(padded))

    def sage_keys(self, k: int, means: int, out: int, scales: int, padded: int) -> None:
        grid = (padded // KEY_GROUP, self.heads)
        self._launch("sage_keys", grid, k, means, out, scales, np.int32(self.tokens))

    def sage_values(self, v: int, scales: int, out: int, padded: int) -> None:
        grid = (padded // TILE, self.heads)
        self._launch("sage_values", grid, v, scales, out, np.int32(self.tokens), np.int32(padded))

    def without_extra(self, out: int, lse: int, extra: int) -> None:
        grid = (-(-self.tokens * self.heads // 16), 1)
        shape = np.int32(self.tokens), np.int32(self.heads)
        self._launch("without_extra", grid, out, lse, *shape, np.float32(extra))

    def _reduce(self, first: str, then: str, x: int, partial: int, out: int, factor: float) -> None:
        shape = np.int32(self.tokens), np.int32(self.head_dim)
        self._launch(first, (self.chunks, self.heads), x, partial, *shape)
        shape = np.int32(self.chunks), np.int32(self.head_dim)
        self._launch(then, (self.heads, 1), partial, out, *shape, np.float32(factor))

    def _launch(self, name: str, grid: tuple[int, int], *arguments: Any) -> None:
        from cuda.core import LaunchConfig, launch

        launch(self._stream, LaunchConfig(grid=grid, block=THREADS), self._kernels[name], *arguments)
