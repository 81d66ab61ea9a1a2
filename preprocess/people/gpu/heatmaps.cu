// Heat maps [maps, height, width] to peaks [maps, 3]: x and y in pixels of the map, and the score.
//
// One block of threads works on one map, with the arithmetic of pose.peaks: DARK, one Taylor step on the logarithm of
// the blurred map. The score is NaN if the map has a number that is not finite. A map without a number above 0 gives
// -1, -1, -1. Macros: THREADS, GAUSSIAN (11 taps), LEAST_HEAT, LOW_HEAT.

constexpr int TAPS = 11, REACH = TAPS / 2;
constexpr int PATCH = 5, AROUND = PATCH + 2 * REACH;  // the 5 x 5 around a peak depend on 15 x 15

__constant__ float gaussian[TAPS] = {GAUSSIAN};

struct Peak { float value; int at; };

// The larger peak, or the first of two equal ones, like numpy's argmax.
__device__ Peak better(Peak a, Peak b) {
    const bool second = b.value > a.value || (b.value == a.value && b.at < a.at);
    return second ? b : a;
}

// Returns the best peak of all threads to every thread.
__device__ Peak best_of_block(Peak mine) {
    __shared__ Peak peaks[THREADS];
    peaks[threadIdx.x] = mine;
    __syncthreads();
    for (int half_of = THREADS / 2; half_of; half_of /= 2) {
        if (threadIdx.x < half_of) peaks[threadIdx.x] = better(peaks[threadIdx.x], peaks[threadIdx.x + half_of]);
        __syncthreads();
    }
    const Peak best = peaks[0];
    __syncthreads();  // `peaks` is written again by the next call
    return best;
}

// One pixel of the blurred map; outside the map is 0.
template <typename T>
__device__ float blurred(const T* map, int width, int height, int x, int y) {
    float sum = 0;
    for (int j = -REACH; j <= REACH; ++j) {
        if (y + j < 0 || y + j >= height) continue;
        float row = 0;
        for (int i = -REACH; i <= REACH; ++i)
            if (x + i >= 0 && x + i < width) row += gaussian[i + REACH] * load(map + (y + j) * width + x + i);
        sum += gaussian[j + REACH] * row;
    }
    return sum;
}

// The Taylor step from the logarithms of the 5 x 5 around a peak; 0 where the Hessian has no inverse.
__device__ void taylor_step(const float (&l)[PATCH][PATCH], float* x, float* y) {
    const float dx = 0.5f * (l[2][3] - l[2][1]), dy = 0.5f * (l[3][2] - l[1][2]);
    const float twice = 2.0f * l[2][2];
    const float dxx = 0.25f * (__fsub_rn(l[2][4], twice) + l[2][0]);
    const float dyy = 0.25f * (__fsub_rn(l[4][2], twice) + l[0][2]);
    const float dxy = 0.25f * (l[3][3] - l[1][3] - l[3][1] + l[1][1]);
    // Rounded apart, like numpy: with fused rounding a singular Hessian would become almost singular.
    const float determinant = __fsub_rn(__fmul_rn(dxx, dyy), __fmul_rn(dxy, dxy));
    if (determinant == 0) return;
    *x -= __fdiv_rn(__fsub_rn(__fmul_rn(dyy, dx), __fmul_rn(dxy, dy)), determinant);
    *y -= __fdiv_rn(__fsub_rn(__fmul_rn(dxx, dy), __fmul_rn(dxy, dx)), determinant);
}

template <typename T>
__device__ void decode(const T* maps, float* peaks, int width, int height) {
    const int size = width * height;
    const T* map = maps + (i64)blockIdx.x * size;
    float* out = peaks + 3 * (i64)blockIdx.x;
    __shared__ float rows[AROUND][PATCH], patch[PATCH][PATCH];

    // A finite number minus itself is 0. A thread without a pixel has `size` as its place.
    Peak mine = {-infinity(), size};
    float finite = 0;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        const float value = load(map + i);
        finite += value - value;
        if (value > mine.value) mine = {value, i};
    }
    const bool broken = __syncthreads_or(!(finite == 0));
    const Peak peak = best_of_block(mine);
    if (broken || !(peak.value > 0)) {
        if (threadIdx.x == 0) out[0] = out[1] = -1, out[2] = broken ? not_a_number() : -1.0f;
        return;
    }
    const int x = peak.at % width, y = peak.at / width;
    if (!(x > 1 && x < width - 2 && y > 1 && y < height - 2)) {
        if (threadIdx.x == 0) out[0] = x, out[1] = y, out[2] = peak.value;
        return;
    }

    for (int k = threadIdx.x; k < AROUND * PATCH; k += THREADS) {
        const int j = k / PATCH, i = k % PATCH;
        const int at_y = y + j - AROUND / 2, at_x = x + i - PATCH / 2 - REACH;
        float sum = 0;
        if (at_y >= 0 && at_y < height)
            for (int t = 0; t < TAPS; ++t)
                if (at_x + t >= 0 && at_x + t < width) sum += gaussian[t] * load(map + at_y * width + at_x + t);
        rows[j][i] = sum;
    }
    __syncthreads();
    float value = infinity();
    if (threadIdx.x < PATCH * PATCH) {
        const int j = threadIdx.x / PATCH, i = threadIdx.x % PATCH;
        value = 0;
        for (int t = 0; t < TAPS; ++t) value += gaussian[t] * rows[j + t][i];
    }
    // The scale of the blurred map matters only where the logarithm is cut off: there it is scaled to the score.
    if (__syncthreads_or(value < LOW_HEAT)) {
        Peak largest = {-infinity(), size};
        for (int i = threadIdx.x; i < size; i += THREADS)
            largest = better(largest, {blurred(map, width, height, i % width, i / width), i});
        value *= peak.value / best_of_block(largest).value;
    }
    if (threadIdx.x < PATCH * PATCH)
        patch[threadIdx.x / PATCH][threadIdx.x % PATCH] = logf(value > LEAST_HEAT ? value : LEAST_HEAT);
    __syncthreads();
    if (threadIdx.x == 0) {
        float at_x = x, at_y = y;
        taylor_step(patch, &at_x, &at_y);
        out[0] = at_x, out[1] = at_y, out[2] = peak.value;
    }
}

#define FOR(type, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_##type(const T* maps, float* peaks, int width,  \
                                                                        int height) {                            \
        decode(maps, peaks, width, height);                                                                      \
    }
FOR(float32, float)
FOR(float16, fp16)
#undef FOR
