// Numbers of 8, 16 and 32 bits. `load` widens one to float, `store` rounds a float to one: to nearest, ties to even.
// kernels.py puts this file in front of every source.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct bf16 { u16 bits; };
struct fp16 { u16 bits; };
struct e4m3 { u8 bits; };
struct e5m2 { u8 bits; };
struct int8 { signed char value; };

constexpr float E4M3_MAX = 448.0f;

// N neighbours in one access.
template <class T, int N>
struct __align__(sizeof(T) * N) Vector { T x[N]; };

// Strides a grid of any size over n elements.
#define EACH(i, n) \
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < (n); i += gridDim.x * (i64)blockDim.x)

__device__ float infinity() { return __int_as_float(0x7F800000); }  // NVRTC has no INFINITY and no NAN
__device__ float not_a_number() { return __int_as_float(0x7FFFFFFF); }

__device__ float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ float widen(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ float widen(e5m2 x) { return widen(fp16{(u16)(x.bits << 8)}); }
__device__ float widen(e4m3 x) {  // its bits make a float 2^120 times too small, subnormals too
    if ((x.bits & 0x7F) == 0x7F) return not_a_number();
    return __uint_as_float((u32)(x.bits & 0x80) << 24 | (u32)(x.bits & 0x7F) << 20) * 0x1p120f;
}

__device__ float widen(int8 x) { return x.value; }

__device__ float load(const float* from) { return *from; }
template <class T>
__device__ float load(const T* from) { return widen(*from); }

// The largest of one number per thread, for all 256 threads of a block. Synchronise before `shared` is written again.
__device__ float largest_of_block(float mine, float* shared) {
    shared[threadIdx.x] = mine;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    return shared[0];
}

// Two numbers in 32 bits, the first in the lower half.
__device__ u32 pack_bf16(float first, float second) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else  // right for all but NaN
    const u32 a = __float_as_uint(first), b = __float_as_uint(second);
    return (a + 0x7FFF + (a >> 16 & 1)) >> 16 | ((b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000u);
#endif
}
__device__ float low(u32 pair) { return __uint_as_float(pair << 16); }  // of bf16
__device__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ u32 pack_fp16(float first, float second) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
// Two numbers in 16 bits; larger ones become +-448.
__device__ u32 pack_e4m3(float first, float second) {
#if __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return 0;  // never launched: older GPUs compute nothing in FP8
#endif
}

__device__ void store(float* to, float x) { *to = x; }
__device__ void store(bf16* to, float x) { to->bits = pack_bf16(x, 0); }
__device__ void store(fp16* to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
__device__ void store(e4m3* to, float x) { to->bits = pack_e4m3(x, 0); }
