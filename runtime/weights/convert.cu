// Weights in the types of their file to the types of the engines. numbers.cuh stands in front.
//
// A weight is [rows, inner], row after row. `scales` are those of scaled FP8 and int8, one per row, or null. A scaled
// value is rounded to float32 first, as numpy does.

template <class In>
__device__ float scaled(const In* in, i64 i, float scale) { return __fmul_rn(load(in + i), scale); }

// Without scales the rows do not matter. With scales a block of threads takes a row, then the row gridDim.x further on.
template <class In, class Out>
__device__ void convert(const In* in, const float* scales, Out* out, i64 rows, i64 inner) {
    if (!scales) {
        EACH(i, rows * inner) store(out + i, load(in + i));
        return;
    }
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x)
        for (i64 i = threadIdx.x; i < inner; i += blockDim.x)
            store(out + row * inner + i, scaled(in, row * inner + i, scales[row]));
}

__device__ float as_bf16(float x) {
    bf16 rounded;
    store(&rounded, x);
    return widen(rounded);
}

// E4M3 with a scale per row: the value rounded to bf16, over the row's largest magnitude over 448. One block of 256
// threads takes a row.
template <class In>
__device__ void quantise(const In* in, const float* scales, e4m3* out, float* out_scales, i64 rows, i64 inner) {
    __shared__ float largest[256];
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const i64 first = row * inner;
        const float scale = scales ? scales[row] : 1.0f;
        float most = 0;
        for (i64 i = threadIdx.x; i < inner; i += blockDim.x)
            most = fmaxf(most, fabsf(as_bf16(scaled(in, first + i, scale))));
        const float out_scale = fmaxf(largest_of_block(most, largest) / E4M3_MAX, 1e-12f);
        if (threadIdx.x == 0) out_scales[row] = out_scale;
        for (i64 i = threadIdx.x; i < inner; i += blockDim.x)
            store(out + first + i, as_bf16(scaled(in, first + i, scale)) / out_scale);
        __syncthreads();  // `largest` is written again for the next row
    }
}

// n float32 numbers in place: each run of `group` times H of files_and_loras.md 7, a Kronecker product of 4x4 matrices
// with halves, negative ones on the anti-diagonal. One pass per factor makes number i of four half their sum less number
// 3 - i. A block of 256 threads takes 1024 numbers, which are whole groups.
extern "C" __global__ void rotate(float* values, i64 n, i64 group) {
    __shared__ float x[1024];
    for (i64 first = blockIdx.x * (i64)1024; first < n; first += gridDim.x * (i64)1024) {
        for (i64 i = threadIdx.x; i < 1024 && first + i < n; i += 256) x[i] = values[first + i];
        __syncthreads();
        for (int width = 1; width < group; width *= 4) {
            float* y = x + threadIdx.x / width * 4 * width + threadIdx.x % width;
            const float a = y[0], b = y[width], c = y[2 * width], d = y[3 * width];
            const float half = __fmul_rn(__fadd_rn(__fadd_rn(a, b), __fadd_rn(c, d)), 0.5f);
            y[0] = half - d;
            y[width] = half - c;
            y[2 * width] = half - b;
            y[3 * width] = half - a;
            __syncthreads();
        }
        for (i64 i = threadIdx.x; i < 1024 && first + i < n; i += 256) values[first + i] = x[i];
        __syncthreads();  // `x` is written again for the next 1024
    }
}

// int8 with a scale per row, its largest magnitude over 127. A number that is not finite shows in the scale.
extern "C" __global__ void quantise_to_int8(const float* values, int8* out, float* out_scales, i64 rows, i64 inner) {
    __shared__ float largest[256];
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const i64 first = row * inner;
        float most = 0;
        for (i64 i = threadIdx.x; i < inner; i += blockDim.x) {
            const float size = fabsf(values[first + i]);
            most = size < infinity() ? fmaxf(most, size) : infinity();
        }
        const float out_scale = fmaxf(largest_of_block(most, largest) / 127.0f, 1e-12f);
        if (threadIdx.x == 0) out_scales[row] = out_scale;
        for (i64 i = threadIdx.x; i < inner; i += blockDim.x)
            out[first + i].value = __float2int_rn(values[first + i] / out_scale);
        __syncthreads();  // `largest` is written again for the next row
    }
}

#define CONVERT(in_name, In, out_name, Out) \
    extern "C" __global__ void convert_##in_name##_to_##out_name( \
        const In* in, const float* scales, Out* out, i64 rows, i64 inner) { \
        convert(in, scales, out, rows, inner); \
    }

#define FROM(name, In) \
    CONVERT(name, In, float32, float) \
    CONVERT(name, In, bfloat16, bf16) \
    CONVERT(name, In, float16, fp16) \
    extern "C" __global__ void quantise_##name( \
        const In* in, const float* scales, e4m3* out, float* out_scales, i64 rows, i64 inner) { \
        quantise(in, scales, out, out_scales, rows, inner); \
    }

FROM(float32, float)
FROM(float16, fp16)
FROM(bfloat16, bf16)
FROM(float8_e4m3fn, e4m3)
FROM(float8_e5m2, e5m2)
FROM(int8, int8)
