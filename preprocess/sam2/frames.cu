// Frames become SAM2's input, and object pointers are gathered side by side.

// Multiplies and adds apart, like numpy.
__device__ float level(float x) { return fminf(fmaxf(floorf(__fadd_rn(x, 0.5f)), 0.0f), 255.0f); }

// Rows [rows, width, 3] of a frame to rows `start` and on of [3, height, size]. Sums are rounded to levels if `levels`,
// else pixels are divided by 255 first.
extern "C" __global__ void across(const u8* frame, float* out, const int* first, const float* weights,
                                  int taps, int width, int rows, int start, int height, int size,
                                  int levels) {
    int x = blockIdx.x * blockDim.x + threadIdx.x;
    if (x >= size) return;
    int low = first[x];
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const u8* line = frame + (i64)row * width * 3;
        float sums[3] = {0.0f, 0.0f, 0.0f};
        for (int tap = 0; tap < taps; ++tap) {
            const u8* pixel = line + (i64)min(low + tap, width - 1) * 3;
            float weight = weights[(i64)tap * size + x];
            for (int c = 0; c < 3; ++c) {
                float value = levels ? (float)pixel[c] : __fdiv_rn((float)pixel[c], 255.0f);
                sums[c] = __fadd_rn(sums[c], __fmul_rn(value, weight));
            }
        }
        for (int c = 0; c < 3; ++c)
            out[((i64)c * height + start + row) * size + x] = levels ? level(sums[c]) : sums[c];
    }
}

// [3, height, size] to [3, size, size]. If `levels`, sums are rounded to levels and normalised as for ImageNet.
extern "C" __global__ void down(const float* in, float* out, const int* first, const float* weights,
                                int taps, int height, int size, int levels,
                                float mean0, float mean1, float mean2,
                                float deviation0, float deviation1, float deviation2) {
    int x = blockIdx.x * blockDim.x + threadIdx.x;
    if (x >= size) return;
    const float means[3] = {mean0, mean1, mean2};
    const float deviations[3] = {deviation0, deviation1, deviation2};
    for (int y = blockIdx.y; y < size; y += gridDim.y) {
        int low = first[y];
        for (int c = 0; c < 3; ++c) {
            const float* plane = in + (i64)c * height * size;
            float sum = 0.0f;
            for (int tap = 0; tap < taps; ++tap) {
                float value = plane[(i64)min(low + tap, height - 1) * size + x];
                sum = __fadd_rn(sum, __fmul_rn(value, weights[(i64)tap * size + y]));
            }
            if (levels) sum = __fdiv_rn(__fsub_rn(__fdiv_rn(level(sum), 255.0f), means[c]), deviations[c]);
            out[((i64)c * size + y) * size + x] = sum;
        }
    }
}

// Copies rows of `channels` from their addresses; zeros for an address of 0. One block per row.
extern "C" __global__ void gather_rows(const u64* rows, float* out, int channels) {
    const float* row = (const float*)rows[blockIdx.x];
    for (int i = threadIdx.x; i < channels; i += blockDim.x)
        out[(i64)blockIdx.x * channels + i] = row ? row[i] : 0.0f;
}
