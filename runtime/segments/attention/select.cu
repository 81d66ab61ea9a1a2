// Which blocks of keys each block of queries attends to: see select.py. q, k and v are [heads, tokens, HEAD_DIM] bf16,
// first in the order of the video, then in that of the blocks.
// Macros: HEAD_DIM, a multiple of 8; BLOCK, tokens of a block (the last block of a head may have fewer).

typedef Vector<bf16, 8> Bf16x8;
typedef Vector<float, 4> Float4;

constexpr int QUADS = HEAD_DIM / 4;   // a pooled head is [QUADS, blocks, 4], so that neighbours load neighbours
constexpr int LANES = HEAD_DIM / 8;   // threads that load a token
constexpr int ROWS = 256 / LANES;     // tokens that a block of threads loads at once
constexpr int QUERIES = 16;           // blocks of queries whose scores a thread computes together

// sorted [3, heads, tokens, HEAD_DIM]: q, k and v in the order of the blocks; `order` has the numbers of their tokens.
// And the means of the blocks: of q and k for the ranks, pooled [2, heads, QUADS, blocks, 4], and of k and v for the
// attention, means [2, heads, blocks, HEAD_DIM]. Grid 3 * heads * blocks, 256 threads. Sums are in a fixed order.
extern "C" __global__ void sort_and_pool(const bf16* q, const bf16* k, const bf16* v, const int* order, bf16* sorted,
                                         float* pooled, bf16* means, i64 tokens, i64 heads) {
    __shared__ float sums[ROWS][HEAD_DIM];
    const int blocks = (int)((tokens + BLOCK - 1) / BLOCK), block = blockIdx.x % blocks;
    const i64 head = blockIdx.x / blocks, input = head / heads;
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES, first = block * BLOCK;
    const int count = tokens - first < BLOCK ? (int)(tokens - first) : BLOCK;
    const bf16* from = (input == 0 ? q : input == 1 ? k : v) + head % heads * tokens * HEAD_DIM + lane * 8;
    bf16* to = sorted + (head * tokens + first) * HEAD_DIM + lane * 8;
    float sum[8] = {};
#pragma unroll
    for (int i = 0; i < BLOCK / ROWS; ++i)
        if (i * ROWS + row < count) {
            const Bf16x8 values = *(const Bf16x8*)(from + (i64)order[first + i * ROWS + row] * HEAD_DIM);
            *(Bf16x8*)(to + (i64)(i * ROWS + row) * HEAD_DIM) = values;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[j] += widen(values.x[j]);
        }
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[row][lane * 8 + j] = sum[j];
    __syncthreads();
    for (int channel = threadIdx.x; channel < HEAD_DIM; channel += 256) {
        float total = 0;
        for (int i = 0; i < ROWS; ++i) total += sums[i][channel];
        total /= count;
        if (input < 2) pooled[((head * QUADS + channel / 4) * blocks + block) * 4 + channel % 4] = total;
        if (input > 0) store(means + ((head - heads) * blocks + block) * HEAD_DIM + channel, total);
    }
}

// A number that is larger where the score is. Of a block that is always kept, the largest.
__device__ u32 rank_of(float score, bool always) {
    const u32 bits = __float_as_uint(score + 0.0f);  // -0 becomes 0
    return always ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// ranks [heads, blocks, blocks]: those of the products of q's and k's means. Always kept are the first `always` blocks,
// the last, and the one of the queries. Grid heads * ceil(blocks / QUERIES) * ceil(blocks / 256), 256 threads.
extern "C" __global__ void rank_blocks(const float* pooled, u32* ranks, i64 blocks, i64 always) {
    __shared__ Float4 queries[QUADS][QUERIES];
    const int count = (int)blocks, groups = (count + QUERIES - 1) / QUERIES, parts = (count + 255) / 256;
    const int head = blockIdx.x / (groups * parts), heads = gridDim.x / (groups * parts);
    const int first = blockIdx.x / parts % groups * QUERIES, key = blockIdx.x % parts * 256 + threadIdx.x;
    const Float4* from = (const Float4*)pooled + (i64)head * QUADS * blocks;
    const Float4* keys = from + (i64)heads * QUADS * blocks;
    for (int i = threadIdx.x; i < QUADS * QUERIES; i += 256) {
        const int query = first + i % QUERIES;
        queries[i / QUERIES][i % QUERIES] = from[i / QUERIES * blocks + (query < count ? query : count - 1)];
    }
    __syncthreads();
    if (key >= count) return;
    float sum[QUERIES] = {};
    for (int quad = 0; quad < QUADS; ++quad) {
        const Float4 there = keys[quad * blocks + key];
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            const Float4 query = queries[quad][i];
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i] += query.x[j] * there.x[j];
        }
    }
    const bool held = key < always || key == count - 1;
#pragma unroll
    for (int i = 0; i < QUERIES; ++i)
        if (first + i < count)
            ranks[((i64)head * blocks + first + i) * blocks + key] = rank_of(sum[i], held || key == first + i);
}

// list [heads, blocks, blocks]: the numbers of the blocks that a row keeps, those of the highest ranks, in ascending
// order, then those of the others. count [heads, blocks]: how many are kept, keep[0] * blocks to the nearest, and at
// least those that always are. Of equal ranks the lower number is kept. A warp has one of the `rows` = heads * blocks.
extern "C" __global__ void choose_blocks(const u32* ranks, int* list, int* count, const float* keep, i64 blocks,
                                         i64 always, i64 rows) {
    const int lane = threadIdx.x % 32, size = (int)blocks, held = (int)always;
    const i64 row = blockIdx.x * (i64)(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const u32* const here = ranks + row * blocks;
    const int query = (int)(row % blocks);
    const int least = held + (query >= held) + (size - 1 >= held && query != size - 1);
    const int share = (int)rintf(keep[0] * size), wanted = share < least ? least : share < size ? share : size;
    auto rank = [&](int key) { return key < size ? here[key] : 0; };
    auto reached = [&](u32 limit) {  // by how many
        int found = 0;
        for (int first = 0; first < size; first += 32)
            found += __popc(__ballot_sync(~0u, rank(first + lane) >= limit));
        return found;
    };

    u32 threshold = 0;  // all of higher ranks are kept
    int there = size;
    for (u32 bit = 1u << 31; bit && there != wanted; bit >>= 1) {
        const int found = reached(threshold | bit);
        if (found >= wanted) threshold |= bit, there = found;
    }
    int ties = wanted - (threshold == ~0u ? 0 : reached(threshold + 1)), kept = 0;
    const u32 before = (1u << lane) - 1;
    for (int first = 0; first < size; first += 32) {
        const int key = first + lane;
        const u32 mine = rank(key), tied = __ballot_sync(~0u, key < size && mine == threshold);
        const bool taken = key < size && (mine > threshold || (mine == threshold && __popc(tied & before) < ties));
        const u32 mask = __ballot_sync(~0u, taken);
        const int place = kept + __popc(mask & before);
        if (key < size) list[row * blocks + (taken ? place : wanted + key - place)] = key;
        kept += __popc(mask);
        ties -= __popc(tied) < ties ? __popc(tied) : ties;
    }
    if (lane == 0) count[row] = kept;
}
