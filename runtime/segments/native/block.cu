// The arithmetic of a transformer block between its matrix products and around its self-attention.
//
// One block of threads works on one token. Its channels stay in registers from the load to the store, so every tensor
// is read once and written once. Threads hold vectors of neighbouring channels: eight, or four of the float32 residual
// stream, so that a warp's accesses have no gaps. Operands have 8 bits and one scale per token. Products arrive
// unscaled: the kernel that loads one multiplies it by `token_scale * weight_scale` and adds the bias. Macros: DIM, FFN,
// HEADS, HEAD_DIM, EPS, SOFTMAX_SCALE, DIM_THREADS, HEADS_BLOCKS, FFN_THREADS; INT8, for int8 operands that are rotated
// in groups of 256 channels (engines/int8.py) and int32 products, instead of E4M3 and bf16.

constexpr int DIM_VECTORS = DIM / 8 / DIM_THREADS;  // eight channels each, per thread
constexpr int FFN_VECTORS = FFN / 8 / FFN_THREADS;
constexpr int STREAM_VECTORS = DIM / 4 / DIM_THREADS;  // four channels each
static_assert(DIM_VECTORS * 8 * DIM_THREADS == DIM && DIM_THREADS % 32 == 0, "threads do not cover DIM");
static_assert(FFN_VECTORS * 8 * FFN_THREADS == FFN && FFN_THREADS % 32 == 0, "threads do not cover FFN");
static_assert(HEAD_DIM == 128 && HEADS * HEAD_DIM == DIM, "heads of 128 channels");

// Blocks that a multiprocessor holds, for kernels that wait for memory: Hopper has 2048 threads, others have 1536.
#if __CUDA_ARCH__ == 900
constexpr int NORM_BLOCKS = 5, GELU_BLOCKS = 2;
#else
constexpr int NORM_BLOCKS = 4, GELU_BLOCKS = 1;
#endif

#ifdef INT8
typedef int8 Code;
typedef int Product;
constexpr float CODE_MAX = 127.0f;
struct Raw { uint4 half[2]; };  // eight numbers of a product
#else
typedef e4m3 Code;
typedef bf16 Product;
constexpr float CODE_MAX = E4M3_MAX;
typedef uint4 Raw;
#endif

// The first channel of a thread's vector `v` of N.
template <int THREADS, int N>
__device__ int channel_of(int v) {
#ifdef INT8
    if (N == 4)  // a warp's vectors v and v + 1 are a group
        return ((v / 2 * THREADS + threadIdx.x / 32 * 32) * 2 + v % 2 * 32 + threadIdx.x % 32) * 4;
#endif
    return (v * THREADS + threadIdx.x) * N;
}

// Loads and stores of a vector. Tensors that a kernel reads once bypass L1.

__device__ uint4 load_once(const void* from) {
    uint4 raw;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "l"(from) : "memory");
    return raw;
}

__device__ void widen(uint4 raw, float (&x)[8]) {
    const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = low(pairs[i]), x[2 * i + 1] = high(pairs[i]);
}

__device__ void load(const bf16* from, float (&x)[8]) { widen(load_once(from), x); }

#ifdef INT8
__device__ Raw load_raw(const int* from) { return {load_once(from), load_once(from + 4)}; }

__device__ void widen_four(uint4 raw, float* x) {
    x[0] = (int)raw.x, x[1] = (int)raw.y, x[2] = (int)raw.z, x[3] = (int)raw.w;
}

__device__ void widen(Raw raw, float (&x)[8]) { widen_four(raw.half[0], x), widen_four(raw.half[1], x + 4); }

__device__ void load(const int* from, float (&x)[4]) { widen_four(load_once(from), x); }

__device__ void load(const int* from, float (&x)[8]) { widen(load_raw(from), x); }
#else
__device__ Raw load_raw(const bf16* from) { return load_once(from); }
#endif

__device__ void load(const bf16* from, float (&x)[4]) {
    uint2 raw;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(raw.x), "=r"(raw.y) : "l"(from) : "memory");
    x[0] = low(raw.x), x[1] = high(raw.x), x[2] = low(raw.y), x[3] = high(raw.y);
}

__device__ void load(const float* from, float (&x)[4]) {
    asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "l"(from) : "memory");
}

template <int N>
__device__ void load_shared_by_tokens(const float* from, float (&x)[N]) {  // scales, biases, norms: stay in L1
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const float4 four = __ldg((const float4*)(from + i));
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
}

__device__ void store(float* to, const float (&x)[4]) { *(float4*)to = make_float4(x[0], x[1], x[2], x[3]); }

__device__ void store(bf16* to, const float (&x)[8]) {
    *(uint4*)to = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

__device__ void store(e4m3* to, const float (&x)[4], float factor) {
    *(u32*)to = pack_e4m3(x[0] * factor, x[1] * factor) | pack_e4m3(x[2] * factor, x[3] * factor) << 16;
}

__device__ void store(e4m3* to, const float (&x)[8], float factor) {
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pack_e4m3(x[2 * i] * factor, x[2 * i + 1] * factor);
    *(uint2*)to = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

__device__ u32 pack_int8(const float* x, float factor) {
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= (u32)(u8)__float2int_rn(x[i] * factor) << 8 * i;
    return codes;
}

__device__ void store(int8* to, const float (&x)[4], float factor) { *(u32*)to = pack_int8(x, factor); }

__device__ void store(int8* to, const float (&x)[8], float factor) {
    *(uint2*)to = make_uint2(pack_int8(x, factor), pack_int8(x + 4, factor));
}

// Reductions over the threads of a token. Every thread gets the result, added in the same order every time. `turn`
// alternates between 0 and 1 in a row of reductions: while some threads read the last one's numbers, others write.

__device__ float add(float a, float b) { return a + b; }
#ifdef INT8  // NaN if one is: int8 has no code for it, so the scale tells
__device__ float largest(float a, float b) { return a > b || a != a ? a : b; }
#else
__device__ float largest(float a, float b) { return fmaxf(a, b); }
#endif

template <int THREADS, float (*combine)(float, float)>
__device__ float reduce(float x, int turn = 0) {
    __shared__ float both[2][THREADS / 32];
    float* partial = both[turn];
#pragma unroll
    for (int lane = 16; lane; lane /= 2) x = combine(x, __shfl_xor_sync(~0u, x, lane));
    if (THREADS == 32) return x;
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = partial[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; ++warp) x = combine(x, partial[warp]);
    return x;
}

#ifdef INT8
// The rotation of 256 channels takes four steps, for the digits of a channel's number in base 4: each makes number i of
// four half their sum less number 3 - i.

__device__ void rotate_four(float* x) {
    const float a = x[0], b = x[1], c = x[2], d = x[3], half = ((a + b) + (c + d)) * 0.5f;
    x[0] = half - d, x[1] = half - c, x[2] = half - b, x[3] = half - a;
}

__device__ float rotate_lanes(float x, int lane) {  // the four are so many lanes apart
    float sum = x + __shfl_xor_sync(~0u, x, lane);
    sum += __shfl_xor_sync(~0u, sum, 2 * lane);
    return sum * 0.5f - __shfl_xor_sync(~0u, x, 3 * lane);
}

template <int VECTORS>
__device__ void rotate(float (&x)[VECTORS][8]) {  // a warp's vectors v are a group
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        rotate_four(x[v]), rotate_four(x[v] + 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float &a = x[v][i], &b = x[v][i + 4];
            const float sum = a + b, c = __shfl_xor_sync(~0u, a, 1), d = __shfl_xor_sync(~0u, b, 1);
            const float half = (sum + (c + d)) * 0.5f;
            a = half - d, b = half - c;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) x[v][i] = rotate_lanes(rotate_lanes(x[v][i], 2), 8);
    }
}

template <int VECTORS>
__device__ void rotate(float (&x)[VECTORS][4]) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        rotate_four(x[v]);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[v][i] = rotate_lanes(rotate_lanes(x[v][i], 1), 4);
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v += 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float &a = x[v][i], &c = x[v + 1][i];
            const float b = __shfl_xor_sync(~0u, a, 16), d = __shfl_xor_sync(~0u, c, 16);
            const float half = ((a + b) + (c + d)) * 0.5f;
            a = half - d, c = half - b;
        }
}
#endif

// Quantises a token's values and writes its scale, like `operand` in build/models/ops.py. Changes `x`.
template <int THREADS, int VECTORS, int N>
__device__ void quantize(float (&x)[VECTORS][N], Code* out, float* out_scale) {
#ifdef INT8
    rotate(x);
#endif
    float most = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < N; ++i) most = largest(most, fabsf(x[v][i]));
    most = largest(1e-10f, reduce<THREADS, largest>(most));
    if (threadIdx.x == 0) out_scale[blockIdx.x] = most * (1.0f / CODE_MAX);
    const float factor = CODE_MAX / most;
    Code* row = out + (i64)blockIdx.x * (THREADS * VECTORS * N);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) store(row + channel_of<THREADS, N>(v), x[v], factor);
}

// Layer norm over the channels, then x * gain + offset. A null `gain` leaves both out.
__device__ void norm(float (&x)[STREAM_VECTORS][4], const float* gain, const float* offset) {
    float sum = 0;
#pragma unroll
    for (int v = 0; v < STREAM_VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += x[v][i];
    const float mean = reduce<DIM_THREADS, add>(sum) * (1.0f / DIM);
    float squares = 0;
#pragma unroll
    for (int v = 0; v < STREAM_VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < 4; ++i) squares += (x[v][i] - mean) * (x[v][i] - mean);
    const float inverse = rsqrtf(reduce<DIM_THREADS, add>(squares, 1) * (1.0f / DIM) + EPS);
#pragma unroll
    for (int v = 0; v < STREAM_VECTORS; ++v) {
        const int channel = channel_of<DIM_THREADS, 4>(v);
        float g[4] = {1, 1, 1, 1}, o[4] = {};
        if (gain) {
            load_shared_by_tokens(gain + channel, g);
            load_shared_by_tokens(offset + channel, o);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) x[v][i] = (x[v][i] - mean) * inverse * g[i] + o[i];
    }
}

// A product's vector of channels, with the scales and the bias.
template <int N>
__device__ void load_product(const Product* product, float token_scale, const float* weight_scale, const float* bias,
                             float (&y)[N]) {
    float s[N], b[N];
    load(product, y);
    load_shared_by_tokens(weight_scale, s);
    load_shared_by_tokens(bias, b);
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = y[i] * (token_scale * s[i]) + b[i];
}

// The six rows of modulation for this step: shift, 1 + scale and gate of the attention, then of the FFN.
extern "C" __global__ void modulation_rows(const float* modulation, const float* time_modulation, float* rows) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 6 * DIM) return;
    const int row = i / DIM;
    rows[i] = modulation[i] + time_modulation[i] + (row == 1 || row == 4 ? 1.0f : 0.0f);
}

extern "C" __global__ void __launch_bounds__(DIM_THREADS, NORM_BLOCKS)
norm_quantize(const float* x, const float* gain, const float* offset, Code* out, float* out_scale) {
    float values[STREAM_VECTORS][4];
#pragma unroll
    for (int v = 0; v < STREAM_VECTORS; ++v)
        load(x + (i64)blockIdx.x * DIM + channel_of<DIM_THREADS, 4>(v), values[v]);
    norm(values, gain, offset);
    quantize<DIM_THREADS>(values, out, out_scale);
}

extern "C" __global__ void __launch_bounds__(DIM_THREADS) quantize_tokens(const bf16* x, Code* out, float* out_scale) {
    float values[DIM_VECTORS][8];
#pragma unroll
    for (int v = 0; v < DIM_VECTORS; ++v)
        load(x + (i64)blockIdx.x * DIM + (v * DIM_THREADS + threadIdx.x) * 8, values[v]);
    quantize<DIM_THREADS>(values, out, out_scale);
}

// q, k and v [heads, tokens, 128] from products: scales, bias, RMS norm of q and k over all channels, RoPE.
// blockIdx.y selects one of the three. q's norm includes the softmax scale. A block goes through tokens: what they
// share stays in registers, and the next one's numbers are loaded while this one's are computed.
extern "C" __global__ void __launch_bounds__(DIM_THREADS, HEADS_BLOCKS)
heads_from_products(const Product* product_q, const Product* product_k, const Product* product_v,
                    const float* token_scale, const float* scale_q, const float* scale_k, const float* scale_v,
                    const float* bias_q, const float* bias_k, const float* bias_v, const float* norm_q,
                    const float* norm_k, const float* cosines, const float* sines, bf16* q, bf16* k, bf16* v_out,
                    int tokens) {
    const int which = blockIdx.y;
    const Product* product = which == 0 ? product_q : which == 1 ? product_k : product_v;
    const float* scale = which == 0 ? scale_q : which == 1 ? scale_k : scale_v;
    const float* bias = which == 0 ? bias_q : which == 1 ? bias_k : bias_v;
    const float* weight = which == 0 ? norm_q : norm_k;
    bf16* out = which == 0 ? q : which == 1 ? k : v_out;
    float s[DIM_VECTORS][8], b[DIM_VECTORS][8], w[DIM_VECTORS][8];
#pragma unroll
    for (int v = 0; v < DIM_VECTORS; ++v) {
        const int channel = (v * DIM_THREADS + threadIdx.x) * 8;
        load_shared_by_tokens(scale + channel, s[v]);
        load_shared_by_tokens(bias + channel, b[v]);
        if (which < 2) load_shared_by_tokens(weight + channel, w[v]);
    }
    const int pair = threadIdx.x * 8 % HEAD_DIM / 2;  // of RoPE, the same in all vectors of a thread
    Raw coming[DIM_VECTORS];
    float4 cosine, sine;
    float coming_scale;
    auto fetch = [&](i64 token) {
        coming_scale = token_scale[token];
#pragma unroll
        for (int v = 0; v < DIM_VECTORS; ++v)
            coming[v] = load_raw(product + token * DIM + (v * DIM_THREADS + threadIdx.x) * 8);
        if (which < 2) {
            cosine = __ldg((const float4*)(cosines + token * (HEAD_DIM / 2) + pair));
            sine = __ldg((const float4*)(sines + token * (HEAD_DIM / 2) + pair));
        }
    };
    int token = blockIdx.x;
    if (token < tokens) fetch(token);
    for (int turn = 0; token < tokens; token += gridDim.x, turn ^= 1) {
        float y[DIM_VECTORS][8], squares = 0;
#pragma unroll
        for (int v = 0; v < DIM_VECTORS; ++v) {
            widen(coming[v], y[v]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                y[v][i] = y[v][i] * (coming_scale * s[v][i]) + b[v][i];
                squares += y[v][i] * y[v][i];
            }
        }
        const float c[4] = {cosine.x, cosine.y, cosine.z, cosine.w}, n[4] = {sine.x, sine.y, sine.z, sine.w};
        if (token + (int)gridDim.x < tokens) fetch(token + gridDim.x);
        if (which < 2) {
            const float inverse = rsqrtf(reduce<DIM_THREADS, add>(squares, turn) * (1.0f / DIM) + EPS)
                                  * (which == 0 ? SOFTMAX_SCALE : 1.0f);
#pragma unroll
            for (int v = 0; v < DIM_VECTORS; ++v)
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
                    const float even = y[v][i] * inverse * w[v][i], odd = y[v][i + 1] * inverse * w[v][i + 1];
                    y[v][i] = even * c[i / 2] - odd * n[i / 2];
                    y[v][i + 1] = even * n[i / 2] + odd * c[i / 2];
                }
        }
#pragma unroll
        for (int v = 0; v < DIM_VECTORS; ++v) {
            const int channel = (v * DIM_THREADS + threadIdx.x) * 8;
            store(out + ((i64)(channel / HEAD_DIM) * tokens + token) * HEAD_DIM + channel % HEAD_DIM, y[v]);
        }
    }
}

// q [tokens, channels] of the cross-attention from a product: scales, bias, RMS norm with the softmax scale.
extern "C" __global__ void __launch_bounds__(DIM_THREADS)
rms_norm_product(const Product* product, const float* token_scale, const float* weight_scale, const float* bias,
                 const float* weight, bf16* out) {
    const i64 token = blockIdx.x;
    float y[DIM_VECTORS][8];
    float squares = 0;
#pragma unroll
    for (int v = 0; v < DIM_VECTORS; ++v) {
        const int channel = (v * DIM_THREADS + threadIdx.x) * 8;
        load_product(product + token * DIM + channel, token_scale[token], weight_scale + channel, bias + channel, y[v]);
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += y[v][i] * y[v][i];
    }
    const float inverse = rsqrtf(reduce<DIM_THREADS, add>(squares) * (1.0f / DIM) + EPS) * SOFTMAX_SCALE;
#pragma unroll
    for (int v = 0; v < DIM_VECTORS; ++v) {
        const int channel = (v * DIM_THREADS + threadIdx.x) * 8;
        float w[8];
        load_shared_by_tokens(weight + channel, w);
#pragma unroll
        for (int i = 0; i < 8; ++i) y[v][i] *= inverse * w[i];
        store(out + token * DIM + channel, y[v]);
    }
}

// Writes the new residual stream, x + gate * product. A null `gate` counts as 1.
__device__ void add_product(const float* x, const Product* product, float token_scale, const float* weight_scale,
                            const float* bias, const float* gate, float* x_out, float (&values)[STREAM_VECTORS][4]) {
#pragma unroll
    for (int v = 0; v < STREAM_VECTORS; ++v) {
        const int channel = channel_of<DIM_THREADS, 4>(v);
        const i64 at = (i64)blockIdx.x * DIM + channel;
        float y[4], g[4];
        load(x + at, values[v]);
        load_product(product + at, token_scale, weight_scale + channel, bias + channel, y);
        if (gate) load_shared_by_tokens(gate + channel, g);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[v][i] += gate ? g[i] * y[i] : y[i];
        store(x_out + at, values[v]);
    }
}

// Adds a product to the residual stream and quantises its norm for the next product. `x_out` may be `x`.
extern "C" __global__ void __launch_bounds__(DIM_THREADS, NORM_BLOCKS)
add_norm_quantize(const float* x, const Product* product, const float* token_scale, const float* weight_scale,
                  const float* bias, const float* gate, float* x_out, const float* gain, const float* offset,
                  Code* out, float* out_scale) {
    float values[STREAM_VECTORS][4];
    add_product(x, product, token_scale[blockIdx.x], weight_scale, bias, gate, x_out, values);
    norm(values, gain, offset);
    quantize<DIM_THREADS>(values, out, out_scale);
}

extern "C" __global__ void __launch_bounds__(DIM_THREADS)
add_gated(const float* x, const Product* product, const float* token_scale, const float* weight_scale,
          const float* bias, const float* gate, float* x_out) {
    float values[STREAM_VECTORS][4];
    add_product(x, product, token_scale[blockIdx.x], weight_scale, bias, gate, x_out, values);
}

// 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3). The power is one of 2.
__device__ float gelu_tanh(float x) {
    constexpr float LINEAR = -2 * 0.7978845608028654f * LOG2_E, CUBIC = LINEAR * 0.044715f;
    float part;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(1.0f + power_of_2(x * (LINEAR + CUBIC * (x * x)))));
    return x * part;
}

extern "C" __global__ void __launch_bounds__(FFN_THREADS, GELU_BLOCKS)
gelu_quantize(const Product* product, const float* token_scale, const float* weight_scale, const float* bias,
              Code* out, float* out_scale) {
    float y[FFN_VECTORS][8];
#pragma unroll
    for (int v = 0; v < FFN_VECTORS; ++v) {
        const int channel = (v * FFN_THREADS + threadIdx.x) * 8;
        load_product(product + (i64)blockIdx.x * FFN + channel, token_scale[blockIdx.x], weight_scale + channel,
                     bias + channel, y[v]);
#pragma unroll
        for (int i = 0; i < 8; ++i) y[v][i] = gelu_tanh(y[v][i]);
    }
    quantize<FFN_THREADS>(y, out, out_scale);
}
