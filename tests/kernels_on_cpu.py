"""CUDA sources run on the CPU: g++ compiles the very text that NVRTC gets, behind a few words of CUDA.

PTX instructions become functions of their name; a thread of the GPU is a thread of the CPU if the kernel has
barriers, else a turn of a loop. Skips where g++ is missing.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trt_wan.runtime.device.kernels import read_source

WORDS = r"""
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)
#define __CUDA_ARCH__ 900

struct alignas(8) uint2 { unsigned x, y; };
uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct alignas(16) uint4 { unsigned x, y, z, w; };
uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> T __ldg(const T* from) { return *from; }
template <class... T> void load_words(const void* from, T&... to) {
    const char* at = (const char*)from;
    ((memcpy(&to, at, sizeof to), at += sizeof to), ...);
}

struct Index { unsigned x, y, z; };
thread_local Index threadIdx, blockIdx;
Index blockDim, gridDim;
std::barrier<>* all_threads;
void __syncthreads() { all_threads->arrive_and_wait(); }

std::barrier<>* warps[32];  // of 32 threads each, where the kernel has barriers
std::atomic<unsigned> votes[32][2];
thread_local unsigned voted;  // two words by turns: nobody votes for the next but one before all have read
unsigned __ballot_sync(unsigned, bool yes) {
    std::atomic<unsigned>& word = votes[threadIdx.x / 32][voted++ % 2];
    const unsigned lane = threadIdx.x % 32, bit = 1u << lane;
    if (yes) word |= bit; else word &= ~bit;
    warps[threadIdx.x / 32]->arrive_and_wait();
    return word;
}
bool __any_sync(unsigned all, bool yes) { return __ballot_sync(all, yes); }
int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T of_thread(unsigned thread, T x) {  // of the same warp
    static T of_block[2][1024];
    static thread_local unsigned times;
    T* const given = of_block[times++ % 2];
    given[threadIdx.x] = x;
    warps[threadIdx.x / 32]->arrive_and_wait();
    return given[thread];
}
template <class T> T __shfl_xor_sync(unsigned, T x, int lanes) { return of_thread(threadIdx.x ^ lanes, x); }
template <class T> T __shfl_sync(unsigned, T x, int lane) { return of_thread(threadIdx.x & ~31 | lane, x); }

template <class To, class From> To as(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
float __int_as_float(int x) { return as<float>(x); }
float __uint_as_float(unsigned x) { return as<float>(x); }
unsigned __float_as_uint(float x) { return as<unsigned>(x); }
float __expf(float x) { return std::exp(x); }
float __fdividef(float x, float y) { return x / y; }
float __log2f(float x) { return std::log2(x); }
int __float2int_rn(float x) { return std::lrint(x); }
float rsqrtf(float x) { return 1 / std::sqrt(x); }
float __fmul_rn(float x, float y) { return x * y; }
float __fadd_rn(float x, float y) { return x + y; }

unsigned to_bf16(float x) {
    const unsigned bits = as<unsigned>(x);
    return std::isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
unsigned to_e4m3(float x) {
    if (std::isnan(x)) return 0x7F;
    const float size = std::fmin(std::fabs(x), 448);
    const int power = std::fmax(std::logb(size), -6);  // of subnormal numbers too
    const int eighths = std::nearbyint(std::ldexp(size, 3 - power));
    return (power + 6) * 8 + eighths | (std::signbit(x) ? 0x80 : 0);
}
template <class X> void cvt_f32_f16(float& to, X x) { to = as<_Float16>((unsigned short)x); }
template <class X> void cvt_rn_f16_f32(X& to, float x) { to = as<unsigned short>((_Float16)x); }
template <class X> void cvt_rn_bf16x2_f32(X& to, float upper, float lower) {
    to = to_bf16(upper) << 16 | to_bf16(lower);
}
template <class X> void cvt_rn_f16x2_f32(X& to, float upper, float lower) {
    to = as<unsigned short>((_Float16)upper) << 16 | as<unsigned short>((_Float16)lower);
}
void rcp_approx_ftz_f32(float& to, float x) { to = 1 / x; }
void ex2_approx_ftz_f32(float& to, float x) { to = std::exp2(x); }
template <class X> void cvt_rn_satfinite_e4m3x2_f32(X& to, float upper, float lower) {
    to = to_e4m3(upper) << 8 | to_e4m3(lower);
}
"""
LAUNCH = r"""
// A float has its own register, wherever it stands. A kernel leaves out what it does not take.
typedef void Kernel(
    i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, float);
extern "C" void launch(
    Kernel* kernel, const Index* grid, unsigned threads, bool barriers, const i64* a, float number) {
    gridDim = *grid;
    blockDim.x = threads;
    std::barrier<> barrier(barriers ? threads : 1);
    all_threads = &barrier;
    std::vector<std::unique_ptr<std::barrier<>>> of_warps;
    for (unsigned warp = 0; barriers && warp < threads / 32; warp++)
        warps[warp] = of_warps.emplace_back(new std::barrier<>(32)).get();
    auto blocks = [&](unsigned thread) {
        threadIdx.x = thread;
        for (blockIdx.z = 0; blockIdx.z < grid->z; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < grid->y; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < grid->x; blockIdx.x++) {
                    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                           a[13], a[14], a[15], a[16], a[17], number);
                    if (barriers) __syncthreads();
                }
    };
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; thread++)
        if (barriers) running.emplace_back(blocks, thread);
        else blocks(thread);
    for (auto& thread : running) thread.join();
}
"""
LOAD = re.compile(r'asm volatile\("ld\.global[^"]*"\s*: ([^:]*) : "l"\((\w+)\) : "memory"\);')
PTX = re.compile(r'asm\("([\w.]+) [^"]*" : "=\w"\(([^)]*)\) : (.*)\);')


class CpuKernels:
    """The kernels of a source that numbers.cuh stands in front of. Their arguments are addresses and 64-bit
    integers, up to eighteen, and one float, `number`.
    """

    def __init__(self, source: str, folder: Path) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("g++ is missing")
        text = read_source("trt_wan.runtime.device", "numbers.cuh") + source

        def function(match: re.Match[str]) -> str:
            operands = re.sub(r'"\w"\(([^)]*)\)', r"\1", match[3])
            return f"{match[1].replace('.', '_')}({match[2]}, {operands});"

        def load(match: re.Match[str]) -> str:
            targets = re.findall(r'"=\w"\(([^)]*)\)', match[1])
            return f"load_words({match[2]}, {', '.join(targets)});"

        text = PTX.sub(function, LOAD.sub(load, text))
        assert "asm(" not in text
        (folder / "kernels.cpp").write_text(WORDS + text + LAUNCH)
        library = folder / "kernels.so"
        options = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([compiler, *options, str(folder / "kernels.cpp"), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))

    def launch(
        self,
        name: str,
        grid: int | tuple[int, ...],
        threads: int,
        barriers: bool,
        *arguments: Any,
        number: float = 0.0,
    ) -> None:
        """Arrays are passed by address."""
        values = [a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in arguments]
        packed: NDArray[np.int64] = np.array(values + [0] * (18 - len(values)), np.int64)
        kernel = ctypes.cast(getattr(self._library, name), ctypes.c_void_p)
        blocks = (ctypes.c_uint * 3)(*(*((grid,) if isinstance(grid, int) else grid), 1, 1)[:3])
        self._library.launch(
            kernel, blocks, threads, barriers, packed.ctypes.data_as(ctypes.c_void_p), ctypes.c_float(number)
        )
