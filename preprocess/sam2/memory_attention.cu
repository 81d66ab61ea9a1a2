// Attention of one head to memories. Blocks of threads share the keys, and a second kernel joins their results: split
// by queries alone, most multiprocessors would idle. A block takes QUERIES queries, a warp 16 of them
// (runtime/device/attention.cuh), over its share of the keys. Two tiles are in flight.

constexpr int QUERIES = WARPS * 16;
constexpr u32 KEYS_BYTES = TILE * CHANNELS * 2, STAGE_BYTES = KEYS_BYTES + TILE * VALUES * 2;

// Two runs of keys count: the first seen[0], and seen[1] from `back_start` on. blockIdx.x selects queries, blockIdx.y a
// share of the keys. `partial` [shares, queries, VALUES] gets the weighted values over the sum of their weights, `logs`
// [shares, queries] the logarithm of that sum to base 2.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
attend(const fp16* queries, const fp16* keys, const fp16* values, const i64* seen, int back_start, float* partial,
       float* logs, int tokens) {
    extern __shared__ __align__(1024) unsigned char buffers[];
    const int lane = threadIdx.x % 32;
    const int first = blockIdx.x * QUERIES + threadIdx.x / 32 * 16 + lane / 4;
    const int rows[2] = {first, first + 8};
    u32 q[CHANNELS / 16][4];
#pragma unroll
    for (int d = 0; d < CHANNELS / 16; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const fp16* row = queries + (i64)min(rows[i % 2], tokens - 1) * CHANNELS;
            q[d][i] = *(const u32*)(row + d * 16 + i / 2 * 8 + lane % 4 * 2);
        }
    Running<VALUES> r;
    r.clear(-1e30f);

    const int front = (int)seen[0], back = (int)seen[1];
    const int front_tiles = (front + TILE - 1) / TILE, tiles = front_tiles + (back + TILE - 1) / TILE;
    const int begin = tiles * blockIdx.y / gridDim.y, end = tiles * (blockIdx.y + 1) / gridDim.y;
    const u32 base = shared_address(buffers);

    auto at = [&](int tile, int& row) {  // the tile's first row, and the keys left in its run
        const int offset = (tile < front_tiles ? tile : tile - front_tiles) * TILE;
        row = tile < front_tiles ? offset : back_start + offset;
        return (tile < front_tiles ? front : back) - offset;
    };
    auto copy = [&](int tile, u32 to) {
        int row;
        const int valid = at(tile, row);
        copy_rows<TILE, CHANNELS, WARPS * 32>(to, keys + (i64)row * CHANNELS, 0, valid);
        copy_rows<TILE, VALUES, WARPS * 32>(to + KEYS_BYTES, values + (i64)row * VALUES, 0, valid);
    };
    if (begin < end) copy(begin, base);
    end_of_copies();
    for (int tile = begin; tile < end; ++tile) {
        const u32 here = base + (tile - begin) % 2 * STAGE_BYTES, next = base + (tile - begin + 1) % 2 * STAGE_BYTES;
        if (tile + 1 < end) copy(tile + 1, next);
        end_of_copies();
        wait_for_copies<1>();
        __syncthreads();
        int row;
        attend_tile<Fp16, TILE, CHANNELS>(q, here, here + KEYS_BYTES, at(tile, row), r);
        __syncthreads();
    }
    const i64 share = (i64)blockIdx.y * tokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = r.row_sum(half);
        if (rows[half] >= tokens) continue;
        const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
        float* out = partial + (share + rows[half]) * VALUES + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < VALUES / 8; ++n)
            *(float2*)(out + n * 8) = make_float2(r.out[n][2 * half] * inverse, r.out[n][2 * half + 1] * inverse);
        if (lane % 4 == 0) logs[share + rows[half]] = r.most[half] * LOG2_E + log2f(sum);
    }
}

// The shares' results, weighted, as fp16 [queries, VALUES]. A thread has two values.
extern "C" __global__ void join_shares(const float* partial, const float* logs, u32* out, int shares, int tokens) {
    constexpr int PAIRS = VALUES / 2;
    const int pair = blockIdx.x * blockDim.x + threadIdx.x, row = pair / PAIRS;
    if (row >= tokens) return;
    float most = -1e30f, sum = 0, low = 0, high = 0;
    for (int i = 0; i < shares; ++i) most = fmaxf(most, logs[(i64)i * tokens + row]);
    for (int i = 0; i < shares; ++i) {
        const float weight = power_of_2(logs[(i64)i * tokens + row] - most);
        const float2 value = ((const float2*)partial)[(i64)i * tokens * PAIRS + pair];
        sum += weight, low += weight * value.x, high += weight * value.y;
    }
    out[pair] = Fp16::pack(low / sum, high / sum);
}
