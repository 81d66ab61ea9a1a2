// Which blocks of keys each block of queries attends to: see select.py. q, k and v are [heads, tokens, HEAD_DIM] bf16.
// Macros: HEAD_DIM, a multiple of 8; BLOCK and QUERIES, tokens of a block of keys and of queries (a head's last may have fewer).

typedef Vector<bf16, 8> Bf16x8;
typedef Vector<float, 4> Float4;

constexpr int QUADS = HEAD_DIM / 4;   // a pooled head is [QUADS, blocks, 4], so that neighbours load neighbours
constexpr int LANES = HEAD_DIM / 8;   // threads that load a token
constexpr int ROWS = 256 / LANES;     // tokens that a block of threads loads at once
constexpr int GROUP = 16;             // blocks of queries whose scores a thread computes together

__device__ int blocks_of(i64 tokens, int size) { return (int)((tokens + size - 1) / size); }

// Each channel's sum over the tokens of a block, whose numbers are `order`, into `whole`. With RANGE the smallest and the largest
// number too. Sums are in a fixed order.
template <bool RANGE>
__device__ void over_tokens(const bf16* from, const int* order, int count, float (&shared)[3][ROWS][HEAD_DIM],
                            float (&whole)[3]) {
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    float sum[8], low[8], high[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] = 0, low[j] = infinity(), high[j] = -infinity();
#pragma unroll
    for (int i = 0; i < (QUERIES + ROWS - 1) / ROWS; ++i)
        if (i * ROWS + row < count) {
            const Bf16x8 values = *(const Bf16x8*)(from + (i64)order[i * ROWS + row] * HEAD_DIM + lane * 8);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float x = widen(values.x[j]);
                sum[j] += x;
                if (RANGE) low[j] = fminf(low[j], x), high[j] = fmaxf(high[j], x);
            }
        }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        shared[0][row][lane * 8 + j] = sum[j];
        if (RANGE) shared[1][row][lane * 8 + j] = low[j], shared[2][row][lane * 8 + j] = high[j];
    }
    __syncthreads();
    if (threadIdx.x >= HEAD_DIM) return;
#pragma unroll
    for (int kind = 0; kind < (RANGE ? 3 : 1); ++kind) {
        whole[kind] = shared[kind][0][threadIdx.x];
#pragma unroll
        for (int other = 1; other < ROWS; ++other) {
            const float x = shared[kind][other][threadIdx.x];
            whole[kind] = kind == 0 ? whole[kind] + x : kind == 1 ? fminf(whole[kind], x) : fmaxf(whole[kind], x);
        }
    }
}

// The means of the blocks, whose tokens have their numbers in `order`. For the ranks: `pooled`, of q [heads, QUADS, blocks of
// queries, 4], and behind it of k [heads, QUADS, blocks, 4]. For the attention: `means` of k and v, [2, heads, blocks, HEAD_DIM];
// `partial` [2, heads, blocks, 3, HEAD_DIM], each block's sums of k and v, and v's smallest and largest numbers (k's are not
// written). Grid heads * (blocks of queries + 2 * blocks), 256 threads.
extern "C" __global__ void pool_blocks(const bf16* q, const bf16* k, const bf16* v, const int* order, float* pooled, bf16* means,
                                       float* partial, i64 tokens, i64 heads) {
    __shared__ float shared[3][ROWS][HEAD_DIM];
    static_assert(QUERIES >= BLOCK && HEAD_DIM <= 256);
    const int query_blocks = blocks_of(tokens, QUERIES), key_blocks = blocks_of(tokens, BLOCK);
    const i64 of_q = heads * query_blocks, number = blockIdx.x - of_q;  // the number of a block of keys or values
    const bool queries = number < 0;
    const int size = queries ? QUERIES : BLOCK, blocks = queries ? query_blocks : key_blocks;
    const i64 head = queries ? blockIdx.x / blocks : number / blocks + heads, input = head / heads;
    const int block = (int)((queries ? blockIdx.x : number) % blocks), first = block * size, channel = threadIdx.x;
    const int count = tokens - first < size ? (int)(tokens - first) : size;
    const bf16* from = (input == 0 ? q : input == 1 ? k : v) + head % heads * tokens * HEAD_DIM;
    float whole[3];
    if (input == 2) over_tokens<true>(from, order + first, count, shared, whole);
    else over_tokens<false>(from, order + first, count, shared, whole);
    if (channel >= HEAD_DIM) return;
    const i64 at = (head - heads) * blocks + block;
    if (input > 0) {
        for (int kind = 0; kind < (input == 2 ? 3 : 1); ++kind) partial[(at * 3 + kind) * HEAD_DIM + channel] = whole[kind];
        store(means + at * HEAD_DIM + channel, whole[0] / count);
    }
    if (input == 1) pooled += of_q * HEAD_DIM;
    if (input < 2) pooled[((head % heads * QUADS + channel / 4) * blocks + block) * 4 + channel % 4] = whole[0] / count;
}

// A number that is larger where the score is. A block that is always kept has the largest.
__device__ u32 rank_of(float score, bool always) {
    const u32 bits = __float_as_uint(score + 0.0f);  // -0 becomes 0
    return always ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The blocks of keys that share tokens with a block of queries: [first, end).
__device__ int first_own(int query) { return query * QUERIES / BLOCK; }
__device__ int end_own(int query, int blocks) {
    const int end = ((query + 1) * QUERIES - 1) / BLOCK + 1;
    return end < blocks ? end : blocks;
}

// ranks [heads, rows, blocks], of blocks of queries and keys: those of the products of q's and k's means. Always kept are the
// first `always` blocks, the last, and those of the queries. Grid heads * ceil(rows / GROUP) * ceil(blocks / 256), 256 threads.
extern "C" __global__ void rank_blocks(const float* pooled, u32* ranks, i64 rows, i64 blocks, i64 always) {
    __shared__ Float4 queries[QUADS][GROUP];
    const int row_count = (int)rows, count = (int)blocks;
    const int groups = (row_count + GROUP - 1) / GROUP, parts = (count + 255) / 256;
    const int head = blockIdx.x / (groups * parts), heads = gridDim.x / (groups * parts);
    const int first = blockIdx.x / parts % groups * GROUP, key = blockIdx.x % parts * 256 + threadIdx.x;
    const Float4* from = (const Float4*)pooled + (i64)head * QUADS * rows;
    const Float4* keys = (const Float4*)pooled + QUADS * ((i64)heads * rows + (i64)head * blocks);
    for (int i = threadIdx.x; i < QUADS * GROUP; i += 256) {
        const int query = first + i % GROUP;
        queries[i / GROUP][i % GROUP] = from[i / GROUP * rows + (query < row_count ? query : row_count - 1)];
    }
    __syncthreads();
    if (key >= count) return;
    float sum[GROUP] = {};
    for (int quad = 0; quad < QUADS; ++quad) {
        const Float4 there = keys[quad * blocks + key];
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const Float4 query = queries[quad][i];
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i] += query.x[j] * there.x[j];
        }
    }
    const bool held = key < always || key == count - 1;
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
        if (first + i < row_count) {
            const bool own = key >= first_own(first + i) && key < end_own(first + i, count);
            ranks[((i64)head * rows + first + i) * blocks + key] = rank_of(sum[i], held || own);
        }
}

// list [heads, rows, blocks] begins with the numbers of the blocks that a row keeps, those of the highest ranks, in ascending
// order. count [heads, rows]: how many, keep[0] * blocks to the nearest, and at least those that always are. Of equal ranks the
// lower number is kept. kept [heads, rows, words]: a bit for each block, in groups of BLOCK, set where it is kept, or where there
// is none. A warp has a row of one of the `heads`.
extern "C" __global__ void choose_blocks(const u32* ranks, int* list, int* count, u32* kept, const float* keep, i64 rows,
                                         i64 blocks, i64 always, i64 heads) {
    const int lane = threadIdx.x % 32, size = (int)blocks, held = (int)always;
    const i64 row = blockIdx.x * (i64)(blockDim.x / 32) + threadIdx.x / 32;
    if (row >= heads * rows) return;
    const u32* const here = ranks + row * blocks;
    const int query = (int)(row % rows), end = end_own(query, size);
    const int first = first_own(query) > held ? first_own(query) : held;
    const int least = held + (end > first ? end - first : 0) + (size - 1 >= held && end != size);
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
    int ties = wanted - (threshold == ~0u ? 0 : reached(threshold + 1)), place = 0;
    const int words = blocks_of(size, BLOCK) * (BLOCK / 32);
    const u32 before = (1u << lane) - 1;
    for (int word = 0; word < words; ++word) {
        const int key = word * 32 + lane;
        const u32 mine = rank(key), tied = __ballot_sync(~0u, key < size && mine == threshold);
        const bool taken = key < size && (mine > threshold || (mine == threshold && __popc(tied & before) < ties));
        const u32 mask = __ballot_sync(~0u, taken), real = __ballot_sync(~0u, key < size);
        if (taken) list[row * blocks + place + __popc(mask & before)] = key;
        if (lane == 0) kept[row * words + word] = mask | ~real;
        place += __popc(mask);
        ties -= __popc(tied) < ties ? __popc(tied) : ties;
    }
    if (lane == 0) count[row] = place;
}
