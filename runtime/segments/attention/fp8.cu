// Before and after FP8 attention: the mean of the keys, bf16 to E4M3 and back. Tensors are [heads, tokens, dim]; dim is
// a multiple of 8, and a thread moves 8 channels (16 bytes of bf16) at a time. Macro: CHUNK, tokens of one sum.

typedef Vector<bf16, 8> Bf16x8;
typedef Vector<e4m3, 8> E4m3x8;

// Sums over a chunk of tokens, per channel: partial [heads, chunks, dim]. Grid (chunks, heads). Sums are in a fixed
// order, so the same input gives the same bits: a thread adds its rows, then a channel adds its threads.
extern "C" __global__ void sum_chunks(const bf16* x, float* partial, int tokens, int dim) {
    __shared__ float shared[8][256];
    int lanes = dim / 8, rows = blockDim.x / lanes, lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
    int stop = min(tokens, (int)(blockIdx.x + 1) * CHUNK);
    const bf16* head = x + (i64)blockIdx.y * tokens * dim;
    float sum[8] = {};
    if (row < rows)
        for (int token = blockIdx.x * CHUNK + row; token < stop; token += rows) {
            Bf16x8 values = *(const Bf16x8*)(head + (i64)token * dim + lane * 8);
            for (int j = 0; j < 8; ++j) sum[j] += widen(values.x[j]);
        }
    for (int j = 0; j < 8; ++j) shared[j][threadIdx.x] = sum[j];
    __syncthreads();
    for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
        float total = 0;
        for (int i = 0; i < rows; ++i) total += shared[channel % 8][i * lanes + channel / 8];
        partial[((i64)blockIdx.y * gridDim.x + blockIdx.x) * dim + channel] = total;
    }
}

// The sum of all chunks of a head, times `factor`. One block per head.
extern "C" __global__ void mean(const float* partial, float* out, int chunks, int dim, float factor) {
    for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
        float total = 0;
        for (int i = 0; i < chunks; ++i) total += partial[((i64)blockIdx.x * chunks + i) * dim + channel];
        out[blockIdx.x * dim + channel] = total * factor;
    }
}

// (x - mean) * factor. `mean` [heads, dim] may be null. Grid (any, heads).
extern "C" __global__ void quantize(const bf16* x, const float* mean, e4m3* out,
                                    int tokens, int dim, float factor) {
    int vectors = tokens * (dim / 8);
    i64 head = (i64)blockIdx.y * vectors;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        Bf16x8 values = ((const Bf16x8*)x)[head + i];
        const float* shift = mean ? mean + blockIdx.y * dim + i % (dim / 8) * 8 : nullptr;
        E4m3x8 result;
        for (int j = 0; j < 8; ++j)
            store(result.x + j, (widen(values.x[j]) - (shift ? shift[j] : 0.0f)) * factor);
        ((E4m3x8*)out)[head + i] = result;
    }
}

// bf16 of x * factor, `vectors` of 8.
extern "C" __global__ void dequantize(const e4m3* x, bf16* out, int vectors, float factor) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        E4m3x8 values = ((const E4m3x8*)x)[i];
        Bf16x8 result;
        for (int j = 0; j < 8; ++j) store(result.x + j, widen(values.x[j]) * factor);
        ((Bf16x8*)out)[i] = result;
    }
}
