"""HopperConvolution on the CPU: g++ compiles its kernel, with functions that do the same as hopper.cuh's.

Shared memory is an array, swizzled as TMA and wgmma do it: bits of an address's row are added to bits of its
column. A thread of the GPU is a thread of the CPU, so tensors must be small.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernels_on_cpu import CpuKernels

from trt_wan.runtime.segments.native import conv_hopper

HEADER = r"""
#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>

#undef __launch_bounds__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __shfl_xor_sync(mask, x, lanes) shuffled(x, lanes)
using std::min;
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(64) Map { u64 words[16]; };  // address, four sizes, four of the box

alignas(1024) u8 shared_bytes[232448];
u8* shared_memory() { return shared_bytes + 16; }
u32 shared_address(const void* p) { return (u32)((const u8*)p - shared_bytes); }
u8* swizzled(u32 at, int row) { return shared_bytes + (at ^ (at >> 7 & (row == 128 ? 7 : 3)) << 4); }

struct Barrier { int count, pending, bytes, phase; };
Barrier all_barriers[sizeof shared_bytes / 8];
std::mutex gate;
std::condition_variable changed;
void change(u32 barrier, int arrived, int bytes) {
    std::lock_guard<std::mutex> lock(gate);
    Barrier& b = all_barriers[barrier / 8];
    b.pending -= arrived, b.bytes += bytes;
    if (b.pending || b.bytes) return;
    b.phase ^= 1, b.pending = b.count;
    changed.notify_all();
}
void barrier_init(u32 barrier, int count) { all_barriers[barrier / 8] = {count, count, 0, 0}; }
void barrier_expect(u32 barrier, int bytes) { change(barrier, 1, bytes); }
void barrier_arrive(u32 barrier) { change(barrier, 1, 0); }
std::deque<std::barrier<>> all_warps;  // the threads of a warp multiply together
void barriers_ready() {
    all_warps.clear();
    for (int i = 0; i < 12; i++) all_warps.emplace_back(32);
}
void barrier_wait(u32 barrier, int parity) {
    std::unique_lock<std::mutex> lock(gate);
    Barrier& b = all_barriers[barrier / 8];
    if (!changed.wait_for(lock, std::chrono::seconds(60), [&] { return b.phase != parity; })) std::abort();
}

std::barrier<> consumers(256);
template <int BARRIER, int THREADS> void sync_threads() { consumers.arrive_and_wait(); }
float shuffled(float x, int lanes) {
    static float of_block[384];
    of_block[threadIdx.x] = x;
    consumers.arrive_and_wait();
    const float other = of_block[threadIdx.x ^ lanes];
    consumers.arrive_and_wait();
    return other;
}
template <int COUNT> void fewer_registers() {}
template <int COUNT> void more_registers() {}

void load_box(u32 to, const void* map, u32 barrier, int x0, int x1, int x2 = 0, int x3 = 0) {
    const u64* words = ((const Map*)map)->words;
    const i64 first[4] = {x0, x1, x2, x3};
    int index = 0;
    i64 i[4];
    for (i[3] = 0; i[3] < words[8]; i[3]++)
        for (i[2] = 0; i[2] < words[7]; i[2]++)
            for (i[1] = 0; i[1] < words[6]; i[1]++)
                for (i[0] = 0; i[0] < words[5]; i[0]++, index++) {
                    i64 from = 0;
                    bool inside = true;
                    for (int d = 3; d >= 0; d--) {
                        const i64 x = first[d] + i[d];
                        inside = inside && x >= 0 && x < (i64)words[1 + d];
                        from = from * words[1 + d] + x;
                    }
                    *(u16*)swizzled(to + index * 2, words[5] * 2) = inside ? ((const u16*)words[0])[from] : 0;
                }
    change(barrier, 0, -index * 2);
}
void prefetch(const void* from, int bytes) {
    if (bytes <= 0 || bytes % 16 || (u64)from % 16) std::abort();
}
void wgmma_fence() {}
void wgmma_commit() {}
template <int GROUPS> void wgmma_wait() { all_warps[threadIdx.x / 32].arrive_and_wait(); }
void written(float&) {}
float tanh_nearly(float x) { return std::tanh(x); }

float element(u64 operand, int row, int k) {
    const int bytes = operand >> 62 == 1 ? 128 : 64;
    const u32 start = (operand & 0x3FFF) << 4, stride = (operand >> 32 & 0x3FFF) << 4;
    return widen(*(const bf16*)swizzled(start + row / 8 * stride + row % 8 * bytes + k * 2, bytes));
}
template <int COUNT>
void wgmma(float (&sums)[COUNT], u64 a, u64 b) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    for (int k = 0; k < 16; k++) {
        const float rows[2] = {element(a, row, k), element(a, row + 8, k)};
        for (int j = 0; j < COUNT / 4; j++)
            for (int e = 0; e < 2; e++) {
                const float column = element(b, j * 8 + lane % 4 * 2 + e, k);
                for (int h = 0; h < 2; h++) sums[j * 4 + h * 2 + e] += rows[h] * column;
            }
    }
}
"""
WRAPPER = r"""
extern "C" void convolve_by_address(
    const Map* pixels, const Map* weights, const float* bias, const bf16* added, bf16* y, const float* gamma,
    bf16* normed, const int* n) {
    convolve(*pixels, *weights, bias, added, y, gamma, normed,
             n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]);
}
"""


def tensor_map(address: int, sizes: Sequence[int], box: Sequence[int]) -> Any:
    def four(numbers: Sequence[int]) -> list[int]:
        return [*numbers, 1, 1, 1][:4]

    assert len(sizes) == len(box) and max(box) <= 256 and box[0] * 2 in (64, 128)
    return np.array([address, *four(sizes), *four(box), *[0] * 7], np.uint64)


class Module:
    """In place of kernels.Module. Its code is a source and macros."""

    def __init__(self, device: Path, source: str, names: Any, *, code: tuple[str, Any]) -> None:
        source, macros = code
        lines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
        kernels = source[source.index("// A convolution for Hopper") :]
        self._kernels = CpuKernels(lines + HEADER + kernels + WRAPPER, device)

    def allow_shared(self, name: str, size: int) -> None:
        assert size <= 232448

    def launch(
        self, stream: Any, name: str, grid: int, threads: int, *arguments: Any, shared: int = 0
    ) -> None:
        if name == "convolve":
            numbers = np.array(arguments[7:], np.int32)
            self._kernels.launch("convolve_by_address", grid, threads, True, *arguments[:7], numbers)
        else:
            self._kernels.launch(name, grid, threads, False, *arguments)


def gpu_on_cpu(folder: Path, patch: pytest.MonkeyPatch, processors: int = 2) -> Any:
    """Enough of a Gpu for HopperConvolution."""
    patch.setattr(conv_hopper, "Module", Module)
    patch.setattr(conv_hopper, "tensor_map", tensor_map)
    patch.setattr(
        conv_hopper, "compile_source", lambda source, capability, macros, accelerated: (source, macros)
    )

    class Device(type(folder)):  # type: ignore[misc]  # a folder for CpuKernels
        properties = SimpleNamespace(multiprocessor_count=processors)

    def once(key: Any, make: Any) -> Any:
        return make()

    return SimpleNamespace(device=Device(folder), capability=(9, 0), stream=None, once=once)
