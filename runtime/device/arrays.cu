// Flat arrays on the device: sampler arithmetic, and weights made at random. The host names a kernel by its element
// type.

// Multiplies and adds apart, as numpy does: CPU and GPU agree to the last bit.
extern "C" __global__ void combine(float* out, i64 n, int terms,
                                   const float* x0, const float* x1, const float* x2,
                                   const float* x3, const float* x4, const float* x5,
                                   float c0, float c1, float c2, float c3, float c4, float c5) {
    const float* x[6] = {x0, x1, x2, x3, x4, x5};
    const float c[6] = {c0, c1, c2, c3, c4, c5};
    EACH(i, n) {
        float sum = __fmul_rn(x[0][i], c[0]);
        for (int k = 1; k < terms; ++k) sum = __fadd_rn(sum, __fmul_rn(x[k][i], c[k]));
        out[i] = sum;
    }
}

// Normal: splitmix64 of the position, then Box-Muller on its two halves.
__device__ float normal(u64 seed, u64 i) {
    u64 z = seed * 0x9E3779B97F4A7C15ull + (i + 1) * 0xD1B54A32D192ED03ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    float u = ((u32)(z >> 8) & 0xFFFFFF) * 5.9604645e-8f + 2.9802322e-8f;
    float v = (u32)(z >> 32) * 2.3283064e-10f;
    return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

#define RANDOM(name, type) \
    extern "C" __global__ void name(type* out, i64 n, u64 seed, i64 first, float mean, float deviation) { \
        EACH(i, n) store(out + i, mean + deviation * normal(seed, first + i)); \
    }
RANDOM(random_float32, float)
RANDOM(random_bfloat16, bf16)
RANDOM(random_float8_e4m3fn, e4m3)
