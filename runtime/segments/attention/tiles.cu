// q, k and v as hopper.cu takes them: quantised, in tiles of QUERIES queries and KEYS keys, rows of 128 bytes whose chunks of
// 16 bytes are swizzled, and of 32 bytes for v. Tensors are bf16 [heads, tokens, 128]. Tokens behind the last one are zeros.
//
// In 8 bits q has a scale per token, k one per tile, v one per channel. The means over all tokens are subtracted from k,
// which leaves the softmax as it is, and from v, and added to the result; with it goes the mean of v's rounding errors,
// which would not average out: bf16 has few different numbers. In bf16 nothing is subtracted.

typedef Vector<bf16, 8> Bf16x8;
constexpr int CHUNK = 256;  // tokens of one sum
constexpr float LARGEST = 127.0f;  // of int8

// Tokens of q, k or v. `order` [tokens], or null, has their numbers in `all`. With `places` (contracts/attention.py) the
// rank's tokens are in `own` [heads, rows, 128], and there is no `order`.
struct Tokens {
    const bf16 *all, *own;
    const int* order;
    int slot_tokens, share, start;
    i64 rows;
    __device__ Tokens(const bf16* all, const bf16* own, const i64* places, const int* order, int head, int tokens)
        : all(all + (i64)head * tokens * DIM), own(own), order(order), share(0) {
        if (!places) return;
        slot_tokens = places[0], share = places[1], start = places[2] * places[1], rows = places[3];
        this->own += head * rows * DIM;
    }
    __device__ const bf16* at(int token) const {
        if (share) {
            const int slot = token / slot_tokens, row = token - slot * slot_tokens - start;
            if (0 <= row && row < share) return own + (slot * share + row) * DIM;
        }
        return all + (i64)(order ? order[token] : token) * DIM;
    }
};

__device__ u32 chunk_at(int row, int chunk) { return row * ROW + ((chunk ^ row % 8) << 4); }

// Sum, smallest and largest of every channel of k (blockIdx.z 0) and v (1): partial [2, heads, chunks, 3, 128].
extern "C" __global__ void __launch_bounds__(256)
channel_parts(const bf16* k, const bf16* v, float* partial, int tokens, const bf16* own_k, const bf16* own_v, const i64* places) {
    __shared__ float shared[3][16][DIM];
    const int lane = threadIdx.x % 16, row = threadIdx.x / 16;
    const Tokens given(blockIdx.z ? v : k, blockIdx.z ? own_v : own_k, places, nullptr, blockIdx.y, tokens);
    const int stop = min(tokens, (int)(blockIdx.x + 1) * CHUNK);
    float sum[8], low[8], high[8];
    for (int j = 0; j < 8; ++j) sum[j] = 0, low[j] = infinity(), high[j] = -infinity();
    for (int token = blockIdx.x * CHUNK + row; token < stop; token += 16) {
        const Bf16x8 x = *(const Bf16x8*)(given.at(token) + lane * 8);
        for (int j = 0; j < 8; ++j) {
            const float y = widen(x.x[j]);
            sum[j] += y, low[j] = fminf(low[j], y), high[j] = fmaxf(high[j], y);
        }
    }
    for (int j = 0; j < 8; ++j) {
        shared[0][row][lane * 8 + j] = sum[j];
        shared[1][row][lane * 8 + j] = low[j];
        shared[2][row][lane * 8 + j] = high[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * DIM; i += 256) {
        const int kind = i / DIM, channel = i % DIM;
        float y = shared[kind][0][channel];
        for (int other = 1; other < 16; ++other) {
            const float z = shared[kind][other][channel];
            y = kind == 0 ? y + z : kind == 1 ? fminf(y, z) : fmaxf(y, z);
        }
        partial[(((i64)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * 3 * DIM + i] = y;
    }
}

// Means of k and v, and v's scale, [heads, 128] each. k's smallest and largest numbers are not read. Grid (heads, 2), 128 threads.
extern "C" __global__ void __launch_bounds__(DIM)
channels_whole(const float* partial, float* key_mean, float* value_mean, float* value_scale, int chunks, int tokens) {
    const float* from = partial + ((i64)blockIdx.y * gridDim.x + blockIdx.x) * chunks * 3 * DIM + threadIdx.x;
    float sum = 0, low = infinity(), high = -infinity();
    for (int i = 0; i < chunks; ++i, from += 3 * DIM) {
        sum += from[0];
        if (blockIdx.y == 1) low = fminf(low, from[DIM]), high = fmaxf(high, from[2 * DIM]);
    }
    const int at = blockIdx.x * DIM + threadIdx.x;
    const float mean = sum / tokens;
    if (blockIdx.y == 0) {
        key_mean[at] = QK == 1 ? 0.0f : mean;
    } else {
        value_mean[at] = PV == 1 ? 0.0f : mean;
        value_scale[at] = PV == 1 ? 1.0f : fmaxf(fmaxf(high - mean, mean - low), 1e-10f) / E4M3_MAX;
    }
}

// Subtracts the mean of the rounded values, which pack_v added up in `sums` [heads, tiles, 128]. Grid heads, 128 threads.
extern "C" __global__ void __launch_bounds__(DIM)
correct_mean(const float* sums, const float* value_scale, float* value_mean, int tiles, int tokens) {
    const float* from = sums + (i64)blockIdx.x * tiles * DIM + threadIdx.x;
    float sum = 0;
    for (int i = 0; i < tiles; ++i) sum += from[i * DIM];
    const int at = blockIdx.x * DIM + threadIdx.x;
    value_mean[at] -= sum / tokens * value_scale[at];
}

__device__ void load16(const bf16* from, float (&x)[16]) {
    for (int part = 0; part < 2; ++part) {
        const Bf16x8 eight = ((const Bf16x8*)from)[part];
        for (int j = 0; j < 8; ++j) x[part * 8 + j] = widen(eight.x[j]);
    }
}

// 16 channels of a row, already scaled, into a tile.
__device__ void store16(u8* tile, int part_bytes, int row, int lane, const float (&x)[16]) {
#if QK == 1
    u32 pairs[8];
    for (int j = 0; j < 8; ++j) pairs[j] = pack_bf16(x[2 * j], x[2 * j + 1]);
    u8* half = tile + lane / 4 * part_bytes;
    for (int part = 0; part < 2; ++part)
        *(uint4*)(half + chunk_at(row, lane % 4 * 2 + part)) =
            make_uint4(pairs[4 * part], pairs[4 * part + 1], pairs[4 * part + 2], pairs[4 * part + 3]);
#else
    u32 words[4];
    for (int j = 0; j < 4; ++j) {
        words[j] = 0;
        for (int byte = 0; byte < 4; ++byte) words[j] |= (u32)(__float2int_rn(x[4 * j + byte]) & 0xFF) << 8 * byte;
    }
    *(uint4*)(tile + chunk_at(row, lane)) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

// Grid (tiles, heads). `shift` [heads, tokens] is what subtracting k's mean took from a query's scores, or null.
extern "C" __global__ void __launch_bounds__(256)
pack_q(const bf16* q, const float* key_mean, u8* out, float* scale, float* shift, int tokens, const bf16* own,
       const i64* places, const int* order) {
    const Tokens given(q, own, places, order, blockIdx.y, tokens);
    const int lane = threadIdx.x % 8;
    const i64 at = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    for (int row = threadIdx.x / 8; row < QUERIES; row += 32) {
        const int token = blockIdx.x * QUERIES + row;
        float x[16] = {};
        if (token < tokens) load16(given.at(token) + lane * 16, x);
        float most = 1e-10f, dot = 0;
        for (int j = 0; j < 16; ++j) {
            most = fmaxf(most, fabsf(x[j]));
            dot += x[j] * key_mean[blockIdx.y * DIM + lane * 16 + j];
        }
        for (int other = 4; other; other /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
            dot += __shfl_xor_sync(~0u, dot, other);
        }
        if (lane == 0) {
            const float whole = QK == 1 ? LOG2_E : most / LARGEST * LOG2_E;
            scale[at * QUERIES + row] = whole + (dot - dot);  // NaN if a number of q or k is not finite: int8 has none
            if (shift && token < tokens) shift[(i64)blockIdx.y * tokens + token] = dot;
        }
        if (QK != 1)
            for (int j = 0; j < 16; ++j) x[j] *= LARGEST / most;
        store16(out + at * Q_BYTES, Q_PART, row, lane, x);
    }
}

// Grid (tiles, heads). `scale` [heads, tiles].
extern "C" __global__ void __launch_bounds__(256)
pack_k(const bf16* k, const float* key_mean, u8* out, float* scale, int tokens, const bf16* own, const i64* places,
       const int* order) {
    const Tokens given(k, own, places, order, blockIdx.y, tokens);
    __shared__ float shared[256];
    const int lane = threadIdx.x % 8;
    const i64 at = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    float x[KEYS / 32][16], most = 1e-10f;
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) {
        const int token = blockIdx.x * KEYS + threadIdx.x / 8 + i * 32;
        if (token < tokens) load16(given.at(token) + lane * 16, x[i]);
        for (int j = 0; j < 16; ++j) {
            x[i][j] = token < tokens ? x[i][j] - key_mean[blockIdx.y * DIM + lane * 16 + j] : 0.0f;
            most = fmaxf(most, fabsf(x[i][j]));
        }
    }
    most = QK == 1 ? 1.0f : largest_of_block(most, shared);
    const float factor = QK == 1 ? 1.0f : LARGEST / most;
    if (threadIdx.x == 0) scale[at] = 1.0f / factor;
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) {
        for (int j = 0; j < 16; ++j) x[i][j] *= factor;
        store16(out + at * K_BYTES, K_PART, threadIdx.x / 8 + i * 32, lane, x[i]);
    }
}

// Grid (tiles, heads). A slice of SLICE keys has a row of 32 bytes for every channel. In E4M3 the keys are in the order in
// which a thread of hopper.cu holds the weights: position p of 16 is key 8 (p % 4 / 2) + 2 (p / 4) + p % 2. Then `sums`
// [heads, tiles, 128] are the sums of the rounded values.
extern "C" __global__ void __launch_bounds__(256)
pack_v(const bf16* v, const float* mean, const float* scale, u8* out, float* sums, int tokens, const bf16* own,
       const i64* places, const int* order) {
    const Tokens given(v, own, places, order, blockIdx.y, tokens);
    extern __shared__ __align__(16) bf16 tile[];  // [KEYS, 128]
    __shared__ float halves[256];
    const i64 at = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x; i < KEYS * DIM / 8; i += 256) {
        const int token = blockIdx.x * KEYS + i / (DIM / 8);
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (token < tokens) eight = *(const uint4*)(given.at(token) + i % (DIM / 8) * 8);
        *(uint4*)&tile[i * 8] = eight;
    }
    __syncthreads();
    const int channel = threadIdx.x % DIM, there = tokens - blockIdx.x * KEYS;
    const float center = mean[blockIdx.y * DIM + channel], factor = 1.0f / scale[blockIdx.y * DIM + channel];
    auto value = [&](int key) { return key < there ? (widen(tile[key * DIM + channel]) - center) * factor : 0.0f; };
    float sum = 0;
    for (int chunk = threadIdx.x / DIM; chunk < SLICES * 2; chunk += 2) {  // of 16 bytes
        u32 w[4];
        for (int j = 0; j < 4; ++j) {
#if PV == 1
            const int key = chunk * 8 + 2 * j;
            w[j] = pack_bf16(value(key), value(key + 1));
#else
            const int key = chunk * 16 + 2 * j;
            w[j] = pack_e4m3(value(key), value(key + 1)) | pack_e4m3(value(key + 8), value(key + 9)) << 16;
            for (int byte = 0; byte < 4; ++byte) sum += widen(e4m3{(u8)(w[j] >> 8 * byte)});
#endif
        }
        *(uint4*)(out + at * V_BYTES + chunk / 2 * SLICE_BYTES + channel * 32 + ((chunk ^ channel / 4) % 2 << 4)) =
            make_uint4(w[0], w[1], w[2], w[3]);
    }
    halves[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < DIM) sums[at * DIM + channel] = halves[channel] + halves[channel + DIM];
}
