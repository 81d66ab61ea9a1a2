"""HopperConvolution and HopperAttention on the CPU: g++ compiles their kernels; C++ stands in for their PTX.

Shared memory is an array, swizzled as TMA and wgmma do it: bits of an address's row are added to bits of its
column. A thread of the GPU is a thread of the CPU, so tensors must be small. wgmma's products run at once, or
as late as the kernel allows (`late`): when it waits for them. Then they read what their operands have become.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernels_on_cpu import CpuKernels

from trt_wan.runtime.segments.attention import hopper as attention
from trt_wan.runtime.segments.native import conv_hopper

HEADER = r"""
#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>

#define __grid_constant__
#define __forceinline__ inline
using std::max, std::min;

alignas(1024) u8 shared_bytes[232448];
u8* shared_memory() { return shared_bytes + 16; }
u32 shared_address(const void* p) { return (u32)((const u8*)p - shared_bytes); }
u8* swizzled(u32 at, int row) { return shared_bytes + (at ^ (at >> 7 & row / 16 - 1) << 4); }

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
void barrier_wait(u32 barrier, int parity) {
    std::unique_lock<std::mutex> lock(gate);
    Barrier& b = all_barriers[barrier / 8];
    if (!changed.wait_for(lock, std::chrono::seconds(60), [&] { return b.phase != parity; })) std::abort();
}

void barriers_ready() {}

void warp_together() { warps[threadIdx.x / 32]->arrive_and_wait(); }
template <int COUNT> void fewer_registers() {}
template <int COUNT> void more_registers() {}
void wgmma_fence() {}
typedef std::vector<std::function<void()>> Products;
thread_local Products begun;
thread_local std::deque<Products> groups;
template <class Work> void product(Work work) {
    if (LATE) begun.push_back(work); else work();
}
void wgmma_commit() {
    groups.push_back(begun);
    begun.clear();
}
template <int GROUPS> void wgmma_wait() {
    for (; groups.size() > GROUPS; groups.pop_front())
        for (auto& work : groups.front()) work();
    warp_together();
}

int widen(signed char x) { return x; }
template <class T>
auto element(u64 operand, int row, int k) {  // of a matrix in shared memory
    const int bytes = 256 >> (operand >> 62);
    const u32 start = (operand & 0x3FFF) << 4, stride = (operand >> 32 & 0x3FFF) << 4;
    return widen(*(const T*)swizzled(start + row / 8 * stride + row % 8 * bytes + k * sizeof(T), bytes));
}
template <class T>
auto in_shared(u64 operand) {  // rows of a warp
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    return [=](int more, int k) { return element<T>(operand, row + more, k); };
}
template <class T, class Sum, int COUNT, class Rows>
void multiply(Sum (&sums)[COUNT], Rows rows, u64 b) {
    for (int k = 0; k < 32 / sizeof(T); k++) {
        const auto upper = rows(0, k), lower = rows(8, k);
        for (int i = 0; i < COUNT; i += 4)
            for (int e = 0; e < 2; e++) {
                const auto column = element<T>(b, i * 2 + threadIdx.x % 4 * 2 + e, k);
                sums[i + e] += upper * column, sums[i + 2 + e] += lower * column;
            }
    }
}
"""
CONVOLUTION = r"""
struct alignas(64) Map { u64 words[16]; };  // address, four sizes, four of the box

std::barrier<> consumers(256);
template <int BARRIER, int THREADS> void sync_threads() { consumers.arrive_and_wait(); }

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
void written(float&) {}
float tanh_nearly(float x) { return std::tanh(x); }
template <int COUNT>
void wgmma(float (&sums)[COUNT], u64 a, u64 b) {
    product([=, &sums] { multiply<bf16>(sums, in_shared<bf16>(a), b); });
}
"""
ATTENTION = r"""
void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    if (to % 16 || (u64)from % 16 || bytes % 16) std::abort();
    memcpy(shared_bytes + to, from, bytes);
    change(barrier, 0, -bytes);
}
void load_shared(float (&x)[4], u32 from) { memcpy(x, shared_bytes + from, 16); }
void store_shared(u32 to, const float (&x)[4]) { memcpy(shared_bytes + to, x, 16); }
float power_of_2(float x) { return std::exp2(x); }
void store_word(u32 to, float x) { memcpy(shared_bytes + to, &x, 4); }
void needed(float, u32) {}

template <class T, int COUNT> void settled_scores(T (&)[COUNT]) {}
void settled(float (&)[64]) {}
template <int COUNT>
void multiply_scores(int (&s)[COUNT], u64 a, u64 b, bool sum) {
    product([=, &s] {
        if (!sum) std::fill(s, s + COUNT, 0);
        multiply<signed char>(s, in_shared<signed char>(a), b);
    });
}
template <int COUNT>
void multiply_scores_bf16(float (&s)[COUNT], u64 a, u64 b, bool sum) {
    product([=, &s] {
        if (!sum) std::fill(s, s + COUNT, 0);
        multiply<bf16>(s, in_shared<bf16>(a), b);
    });
}
#if PV == 0
typedef e4m3 Weight;
#else
typedef bf16 Weight;
#endif
template <class T>
auto in_registers(const u32 (&a)[4]) {  // four threads have 16 bytes of a row, then the next 16
    static u32 of_block[2][512][4];
    static thread_local int times;
    auto& words = of_block[times++ % 2];
    std::copy(a, a + 4, words[threadIdx.x]);
    warp_together();
    return [&](int more, int k) {
        const int byte = k * sizeof(T);
        const u32* word = words[threadIdx.x / 4 * 4 + byte % 16 / 4] + byte / 16 * 2 + more / 8;
        return widen(((const T*)word)[byte % 4 / sizeof(T)]);
    };
}
void multiply_values(float (&o)[64], const u32 (&a)[4], u64 b) {
    product([=, &o, &a] { multiply<Weight>(o, in_registers<Weight>(a), b); });
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


BARRIERS = ("channel_parts", "pack_q", "pack_k", "pack_v", "attend")


def tensor_map(address: int, sizes: Sequence[int], box: Sequence[int]) -> Any:
    def four(numbers: Sequence[int]) -> list[int]:
        return [*numbers, 1, 1, 1][:4]

    assert len(sizes) == len(box) and max(box) <= 256 and box[0] * 2 in (64, 128)
    return np.array([address, *four(sizes), *four(box), *[0] * 7], np.uint64)


FUNCTION = re.compile(r"^(?:template <[^\n]*>\n)?__device__ [^\n]*\{(?:[^\n]*\}$|\n.*?^\}$)", re.M | re.S)
MEMORY = re.compile(r"extern __shared__ __align__\(\d+\) ([\w ]+) (\w+)\[\];")


def without_instructions(source: str) -> str:
    """Leaves out the functions in PTX."""
    source = FUNCTION.sub(lambda match: "" if "asm volatile" in match[0] else match[0], source)
    return MEMORY.sub(r"\1* \2 = (\1*)shared_memory();", source)


class Module:
    """In place of kernels.Module. Its code is a source and macros."""

    def __init__(
        self,
        device: Path,
        source: str,
        names: Any,
        macros: Any = None,
        *,
        accelerated: bool = True,
        code: tuple[str, Any] | None = None,
        late: bool = False,
    ) -> None:
        if code:
            source, macros = code
        first = source.index("// A convolution for Hopper" if code else "// Self-attention on Hopper")
        kernels = source[first:]  # hopper.cuh is in front
        text = CONVOLUTION + kernels + WRAPPER if code else ATTENTION + without_instructions(kernels)
        defined = {**macros, "LATE": int(late)}
        lines = "".join(f"#define {name} {value}\n" for name, value in defined.items())
        self._kernels = CpuKernels(lines + HEADER + text, device)

    def allow_shared(self, name: str, size: int) -> None:
        assert size <= 232448

    def launch(
        self,
        stream: Any,
        name: str,
        grid: int | tuple[int, ...],
        threads: int,
        *arguments: Any,
        shared: int = 0,
    ) -> None:
        if name == "convolve":
            numbers = np.array(arguments[7:], np.int32)
            self._kernels.launch("convolve_by_address", grid, threads, True, *arguments[:7], numbers)
        else:
            self._kernels.launch(name, grid, threads, name in BARRIERS, *arguments)


def gpu_on_cpu(folder: Path, patch: pytest.MonkeyPatch, processors: int = 2, late: bool = False) -> Any:
    """Enough of a Gpu for HopperConvolution and HopperAttention."""
    patch.setattr(conv_hopper, "Module", partial(Module, late=late))
    patch.setattr(attention, "Module", partial(Module, late=late))
    patch.setattr(conv_hopper, "tensor_map", tensor_map)
    patch.setattr(
        conv_hopper, "compile_source", lambda source, capability, macros, accelerated: (source, macros)
    )

    class Device(type(folder)):  # type: ignore[misc]  # a folder for CpuKernels
        properties = SimpleNamespace(multiprocessor_count=processors)

    def once(key: Any, make: Any) -> Any:
        return make()

    return SimpleNamespace(device=Device(folder), capability=(9, 0), stream=None, once=once)
