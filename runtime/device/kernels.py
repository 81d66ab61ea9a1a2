"""The few kernels that are not TensorRT's: sampler arithmetic, and weights made or converted on the device.

Compiled by NVRTC for the GPU that is there; all work on flat arrays.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from trt_wan.runtime.device.cubins import kept

THREADS = 256
MAX_TERMS = 6  # of a linear combination: UniPC's corrector has four

SOURCE = r"""
typedef unsigned char fp8;    // E4M3
typedef unsigned short bf16;
typedef long long i64;
typedef unsigned long long u64;

#define EACH(i, n) \
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (i64)blockDim.x)

__device__ void store(float* out, float x) { *out = x; }
__device__ void store(bf16* out, float x) {  // to nearest, ties to even; no NaN comes here
    unsigned bits = __float_as_uint(x);
    *out = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
__device__ void store(fp8* out, float x) {
#if __CUDA_ARCH__ >= 890
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    *out = pair & 0xFF;
#endif
}
__device__ float load(const bf16* x) { return __uint_as_float((unsigned)*x << 16); }

extern "C" __global__ void combine(float* out, i64 n, int terms,
                                   const float* x0, const float* x1, const float* x2,
                                   const float* x3, const float* x4, const float* x5,
                                   float c0, float c1, float c2, float c3, float c4, float c5) {
    // Multiply and add apart, as numpy does: CPU and GPU agree to the last bit.
    const float* x[6] = {x0, x1, x2, x3, x4, x5};
    const float c[6] = {c0, c1, c2, c3, c4, c5};
    EACH(i, n) {
        float sum = __fmul_rn(x[0][i], c[0]);
        for (int k = 1; k < terms; ++k) sum = __fadd_rn(sum, __fmul_rn(x[k][i], c[k]));
        out[i] = sum;
    }
}

__device__ float normal(u64 seed, u64 i) {  // splitmix64 of the position, then Box-Muller on its two halves
    u64 z = seed * 0x9E3779B97F4A7C15ull + (i + 1) * 0xD1B54A32D192ED03ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    float u = ((unsigned)(z >> 8) & 0xFFFFFF) * 5.9604645e-8f + 2.9802322e-8f;
    float v = (unsigned)(z >> 32) * 2.3283064e-10f;
    return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

#define RANDOM(name, type) \
    extern "C" __global__ void name(type* out, i64 n, u64 seed, float mean, float deviation) { \
        EACH(i, n) store(out + i, mean + deviation * normal(seed, i)); \
    }
RANDOM(random_float32, float)
RANDOM(random_bfloat16, bf16)
RANDOM(random_float8_e4m3fn, fp8)

// One block of threads per output channel: its largest magnitude over 448 is the scale of the row.
extern "C" __global__ void quantize_rows(const bf16* w, fp8* out, float* scale, int inner) {
    __shared__ float largest[256];
    const bf16* row = w + (i64)blockIdx.x * inner;
    float most = 0;
    for (int i = threadIdx.x; i < inner; i += blockDim.x) most = fmaxf(most, fabsf(load(row + i)));
    largest[threadIdx.x] = most;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half)
            largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + half]);
        __syncthreads();
    }
    float s = fmaxf(largest[0] / 448.0f, 1e-12f);
    if (threadIdx.x == 0) scale[blockIdx.x] = s;
    for (int i = threadIdx.x; i < inner; i += blockDim.x)
        store(out + (i64)blockIdx.x * inner + i, load(row + i) / s);
}
"""

NAMES = ("combine", "random_float32", "random_bfloat16", "random_float8_e4m3fn", "quantize_rows")


def compile_source(source: str, major: int, minor: int, macros: Mapping[str, object] | None = None) -> Any:
    """The code of kernels for GPUs of a compute capability, compiled once per machine; needs no GPU."""
    from cuda.core import ObjectCode, Program, ProgramOptions

    standard, arch = "c++17", f"sm_{major}{minor}"
    defined = [(name, str(value)) for name, value in (macros or {}).items()]

    def compile() -> bytes:
        options = ProgramOptions(std=standard, arch=arch, define_macro=defined or None)
        return bytes(Program(source, "c++", options).compile("cubin").code)

    origin = (source, standard, arch, *(f"{name}={value}" for name, value in defined))
    return ObjectCode.from_cubin(kept(origin, compile))


def attention_source() -> str:
    """What stands in front of the source of a kernel that attends."""
    return (files(__package__) / "attention.cuh").read_text(encoding="utf-8")


def compile_for(major: int, minor: int) -> Any:
    """The code of these kernels."""
    return compile_source(SOURCE, major, minor)


def allow_shared_memory(kernel: Any, size: int) -> None:
    """More than 48 KB have to be asked for."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    error, function = driver.cuKernelGetFunction(int(kernel.handle))
    assert not error, error
    (error,) = driver.cuFuncSetAttribute(function, attribute, size)
    assert not error, error


class Kernels:
    """The compiled kernels of one device, by name."""

    def __init__(self, device: Any) -> None:
        module = compile_for(*device.compute_capability)
        self._kernels = {name: module.get_kernel(name) for name in NAMES}

    def launch(self, stream: Any, name: str, blocks: int, *arguments: Any) -> None:
        from cuda.core import LaunchConfig, launch

        launch(stream, LaunchConfig(grid=blocks, block=THREADS), self._kernels[name], *arguments)
