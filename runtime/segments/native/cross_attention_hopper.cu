// Cross-attention to text and image on Hopper (sm_90a): the sum of two softmaxes over the same queries.
//
// `arrange_keys` lays keys and values out in tiles that wgmma reads from shared memory as they are, so that one bulk
// copy brings a tile's keys, another its values. Then each multiprocessor takes items of 128 queries of a head, head
// after head, with one block of threads. The first warpgroup copies: one thread the keys and values, three warps the
// queries of the item after this one. The two others have 64 queries each. While a tile's values are added, they
// compute the softmax of the next tile. Queries are [tokens, heads * 128] and already scaled.
//
// cross_attention.py puts the products in front: Multiply<N> and add_values. Macros besides DIM and HEADS: the numbers
// of TEXT_KEYS and IMAGE_KEYS, of keys in a tile (TEXT_TILE, IMAGE_TILE) and of tiles (TEXT_TILES, IMAGE_TILES).

constexpr int ROWS = 64;  // queries of a warpgroup
constexpr int CONSUMERS = 2;
constexpr int QUERIES = ROWS * CONSUMERS;  // of an item
constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int SLAB_BYTES = 128;  // wgmma's swizzle spans 128 bytes, so the rows of a tile are stored in two slabs
constexpr int CHUNKS = ROW_BYTES / 16;
constexpr int TEXT_ROWS = TEXT_TILES * TEXT_TILE;  // with zeros behind the last key
constexpr int ALL_ROWS = TEXT_ROWS + IMAGE_TILES * IMAGE_TILE;
constexpr int LOADERS = 96;  // threads that copy queries

// Shared memory: two buffers each of queries, of a tile's keys and of its values, then the barriers.
constexpr int QUERY_BYTES = QUERIES * ROW_BYTES;
constexpr int TILE_BYTES = (TEXT_TILE > IMAGE_TILE ? TEXT_TILE : IMAGE_TILE) * ROW_BYTES;
enum Barrier { QUERIES_FULL, QUERIES_FREE, KEYS_FULL, KEYS_FREE, VALUES_FULL, VALUES_FREE, BARRIERS };

struct Shared {
    u32 base;
    __device__ u32 queries(u32 buffer) const { return base + buffer * QUERY_BYTES; }
    __device__ u32 keys(u32 buffer) const { return base + 2 * QUERY_BYTES + buffer * TILE_BYTES; }
    __device__ u32 values(u32 buffer) const { return keys(buffer) + 2 * TILE_BYTES; }
    __device__ u32 barrier(Barrier kind, u32 buffer) const {
        return base + 2 * QUERY_BYTES + 4 * TILE_BYTES + (kind * 2 + buffer) * 8;
    }
};

struct Use {  // the n-th use of two buffers
    u32 n = 0;
    __device__ u32 buffer() const { return n & 1; }
    __device__ u32 full() const { return n >> 1 & 1; }  // parities to wait for
    __device__ u32 free() const { return full() ^ 1; }
};

// Place of a chunk of 16 bytes in a slab of rows.
__device__ u32 swizzled(int row, int chunk) { return row * SLAB_BYTES + ((chunk ^ row % 8) << 4); }

// The tiles of every head: text before image; of each tile the keys, then the values.
extern "C" __global__ void arrange_keys(const bf16* text_k, const bf16* text_v, const bf16* image_k,
                                        const bf16* image_v, u8* tiles) {
    EACH(i, (i64)HEADS * ALL_ROWS * 2 * CHUNKS) {
        const int chunk = i % CHUNKS, row = i / CHUNKS % ALL_ROWS, values = i / (CHUNKS * ALL_ROWS) % 2;
        const i64 head = i / (CHUNKS * ALL_ROWS * 2);
        const bool text = row < TEXT_ROWS;
        const int key = text ? row : row - TEXT_ROWS;
        const int keys = text ? TEXT_KEYS : IMAGE_KEYS, size = text ? TEXT_TILE : IMAGE_TILE;
        const bf16* from = text ? (values ? text_v : text_k) : (values ? image_v : image_k);
        uint4 numbers = make_uint4(0, 0, 0, 0);
        if (key < keys) numbers = *(const uint4*)(from + (head * keys + key) * HEAD_DIM + chunk * 8);
        u8* tile = tiles + (head * ALL_ROWS + row - key % size) * (2 * ROW_BYTES) + values * size * ROW_BYTES;
        *(uint4*)(tile + chunk / 8 * size * SLAB_BYTES + swizzled(key % size, chunk % 8)) = numbers;
    }
}

__device__ void copy(u32 to, const u8* from, u32 bytes, u32 full) {
    barrier_expect(full, bytes);
    copy_bulk(to, from, bytes, full);
}

__device__ void copy_keys(const Shared& shared, const u8* tiles, int items, int items_of_head) {
    Use use;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const u8* from = tiles + (i64)(item / items_of_head) * ALL_ROWS * (2 * ROW_BYTES);
#pragma unroll 1
        for (int tile = 0; tile < TEXT_TILES + IMAGE_TILES; ++tile, ++use.n) {
            const u32 bytes = (tile < TEXT_TILES ? TEXT_TILE : IMAGE_TILE) * ROW_BYTES, buffer = use.buffer();
            barrier_wait(shared.barrier(KEYS_FREE, buffer), use.free());
            copy(shared.keys(buffer), from, bytes, shared.barrier(KEYS_FULL, buffer));
            barrier_wait(shared.barrier(VALUES_FREE, buffer), use.free());
            copy(shared.values(buffer), from + bytes, bytes, shared.barrier(VALUES_FULL, buffer));
            from += 2 * bytes;
        }
    }
}

__device__ void copy_queries(const Shared& shared, const bf16* queries, int tokens, int items, int items_of_head) {
    Use use;
    for (int item = blockIdx.x; item < items; item += gridDim.x, ++use.n) {
        const int head = item / items_of_head, first = item % items_of_head * QUERIES;
        barrier_wait(shared.barrier(QUERIES_FREE, use.buffer()), use.free());
#pragma unroll 2
        for (int i = threadIdx.x - 32; i < QUERIES * CHUNKS; i += LOADERS) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            const bool there = first + row < tokens;
            const bf16* from = queries + (i64)(there ? first + row : 0) * DIM + head * HEAD_DIM + chunk * 8;
            const u32 slab = (row / ROWS * 2 + chunk / 8) * (ROWS * SLAB_BYTES);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(shared.queries(use.buffer()) + slab + swizzled(row % ROWS, chunk % 8)), "l"(from),
                            "r"(there ? 16 : 0) : "memory");
        }
        end_of_copies();
        wait_for_copies<0>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what these threads wrote
        barrier_arrive(shared.barrier(QUERIES_FULL, use.buffer()));
    }
}

// Keeps reads and writes of x on their side of a wait: the compiler does not know when a product writes.
template <int N>
__device__ void fixed(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(x[n][i]) :: "memory");
}
template <int N>
__device__ void fixed(u32 (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(x[n][i]) :: "memory");
}
// Keeps the compiler from computing every tile's descriptions ahead, which takes registers.
__device__ u32 fixed(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// What a thread of a warpgroup has of its 64 queries: two rows, each shared by four threads. Its loops are not
// unrolled: then the compiler mixes the steps, and the registers do not suffice.
struct Attention {
    Shared shared;
    u32 queries;  // address
    int group;
    Use use;  // of keys and values
    float out[HEAD_DIM / 8][4], most[2], sum[2];
    u32 text[HEAD_DIM / 8][2];  // the text's result as bf16: there are too few registers for float32

    // The warpgroups issue products in turns, so that one computes a softmax during the other's products.
    __device__ void wait_for_turn() { asm volatile("bar.sync %0, 256;" :: "r"(group + 1) : "memory"); }
    __device__ void give_turn() { asm volatile("bar.arrive %0, 256;" :: "r"(CONSUMERS - group) : "memory"); }

    __device__ void release(Barrier kind, u32 buffer) {
        if (threadIdx.x % 32 == 0) barrier_arrive(shared.barrier(kind, buffer));
    }

    template <int N>
    __device__ void multiply(float (&s)[N / 8][4]) {
        const u32 q = fixed(queries), k = fixed(shared.keys(use.buffer()));
        barrier_wait(shared.barrier(KEYS_FULL, use.buffer()), use.full());
        wait_for_turn();
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d)
            Multiply<N>::run(s, matrix(q + d / 4 * ROWS * SLAB_BYTES + d % 4 * 32),
                             matrix(k + d / 4 * N * SLAB_BYTES + d % 4 * 32), d > 0);
        wgmma_commit();
    }

    template <int N>
    __device__ void add(const u32 (&p)[N / 16][4], Use of, bool begins) {
        barrier_wait(shared.barrier(VALUES_FULL, of.buffer()), of.full());
        wgmma_fence();
        add_values<N>(out, p, fixed(shared.values(of.buffer())), !begins);
        wgmma_commit();
    }

    // Logits to probabilities, of which those of the first `valid` keys count. Earlier ones shrink by `shrink`.
    template <int N>
    __device__ void soften(float (&s)[N / 8][4], int valid, bool begins, float (&shrink)[2]) {
        if (valid < N) {
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (n * 8 + threadIdx.x % 4 * 2 + i % 2 >= valid) s[n][i] = -infinity();
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = begins ? -infinity() : most[half];
#pragma unroll
            for (int n = 0; n < N / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            shrink[half] = begins ? 0 : power_of_2((most[half] - largest) * LOG2_E);
            most[half] = largest;
            float added = 0;
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    s[n][i] = power_of_2(s[n][i] * LOG2_E - largest * LOG2_E);
                    added += s[n][i];
                }
            sum[half] = begins ? added : sum[half] * shrink[half] + added;
        }
    }

    __device__ float inverse_sum(int half) const {
        float whole = sum[half];
        whole += __shfl_xor_sync(~0u, whole, 1);
        return 1.0f / (whole + __shfl_xor_sync(~0u, whole, 2));
    }

    template <int N>
    __device__ static void round(const float (&s)[N / 8][4], u32 (&p)[N / 16][4]) {
#pragma unroll
        for (int n = 0; n < N / 16; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                p[n][i] = pack_bf16(s[2 * n + i / 2][i % 2 * 2], s[2 * n + i / 2][i % 2 * 2 + 1]);
        fixed(p);
    }

    template <int N>
    __device__ void first(u32 (&p)[N / 16][4], int valid) {
        float s[N / 8][4], shrink[2];
        multiply<N>(s);
        give_turn();
        wgmma_wait<0>();
        fixed(s);
        release(KEYS_FREE, use.buffer());
        soften<N>(s, valid, true, shrink);
        round<N>(s, p);
        ++use.n;
    }

    // Adds the values of the tile before, whose probabilities are `earlier`, and computes those of the next tile.
    template <int BEFORE, int N>
    __device__ void next(const u32 (&earlier)[BEFORE / 16][4], u32 (&p)[N / 16][4], int valid, bool earlier_begins,
                         bool begins) {
        float s[N / 8][4], shrink[2];
        const Use before{use.n - 1};
        multiply<N>(s);
        add<BEFORE>(earlier, before, earlier_begins);
        give_turn();
        wgmma_wait<1>();
        fixed(s);
        release(KEYS_FREE, use.buffer());
        const float inverse[2] = {begins ? inverse_sum(0) : 0, begins ? inverse_sum(1) : 0};
        soften<N>(s, valid, begins, shrink);
        wgmma_wait<0>();
        fixed(out);
        release(VALUES_FREE, before.buffer());
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float &even = out[n][2 * half], &odd = out[n][2 * half + 1];
                if (begins)
                    text[n][half] = pack_bf16(even * inverse[half], odd * inverse[half]);
                else
                    even *= shrink[half], odd *= shrink[half];
            }
        round<N>(s, p);
        fixed(out);
        ++use.n;
    }

    // The result is in `out`, not yet divided by `sum`, and in `text`.
    __device__ void run() {
        u32 p[TEXT_TILE / 16][4], r[IMAGE_TILE / 16][4];
        first<TEXT_TILE>(p, TEXT_KEYS);
#pragma unroll 1
        for (int tile = 1; tile < TEXT_TILES; ++tile)
            next<TEXT_TILE, TEXT_TILE>(p, p, TEXT_KEYS - tile * TEXT_TILE, tile == 1, false);
        next<TEXT_TILE, IMAGE_TILE>(p, r, IMAGE_KEYS, TEXT_TILES == 1, true);
#pragma unroll 1
        for (int tile = 1; tile < IMAGE_TILES; ++tile)
            next<IMAGE_TILE, IMAGE_TILE>(r, r, IMAGE_KEYS - tile * IMAGE_TILE, tile == 1, false);
        const Use last{use.n - 1};
        add<IMAGE_TILE>(r, last, IMAGE_TILES == 1);
        wgmma_wait<0>();
        fixed(out);
        release(VALUES_FREE, last.buffer());
    }

    // Four threads that share a row swap, so that each stores 16 bytes. `to` is the row of the warp's first query.
    __device__ void store(bf16* to, int rows_left) {
        const int lane = threadIdx.x % 32;
        const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = inverse_sum(half);
            const int row = lane / 4 + half * 8;
#pragma unroll
            for (int part = 0; part < HEAD_DIM / 32; ++part) {
                u32 v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int n = part * 4 + i;
                    v[i] = pack_bf16(out[n][2 * half] * inverse + low(text[n][half]),
                                     out[n][2 * half + 1] * inverse + high(text[n][half]));
                }
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const u32 got = __shfl_xor_sync(~0u, odd ? v[i] : v[i + 1], 1);
                    (odd ? v[i] : v[i + 1]) = got;
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const u32 got = __shfl_xor_sync(~0u, upper ? v[i] : v[i + 2], 2);
                    (upper ? v[i] : v[i + 2]) = got;
                }
                if (row < rows_left)
                    *(uint4*)(to + (i64)row * DIM + part * 32 + lane % 4 * 8) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(128 + CONSUMERS * 128, 1)
cross_attention_hopper(const bf16* queries, const u8* tiles, bf16* out, int tokens) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared shared{shared_address(memory)};
    const int items_of_head = (tokens + QUERIES - 1) / QUERIES, items = items_of_head * HEADS;
    if (threadIdx.x < 2) {
        const int warps = CONSUMERS * 4;
        const int arrivals[BARRIERS] = {LOADERS, warps, 1, warps, 1, warps};
        for (int kind = 0; kind < BARRIERS; ++kind)
            barrier_init(shared.barrier((Barrier)kind, threadIdx.x), arrivals[kind]);
        barriers_ready();
    }
    __syncthreads();
    // Registers move from the copying warpgroup to the others: 24 + 2 * 240 = 3 * 168. With one more, they wait forever.
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
    if (group < 0) {
        fewer_registers<24>();
        if (threadIdx.x == 0)
            copy_keys(shared, tiles, items, items_of_head);
        else if (threadIdx.x >= 128 - LOADERS)
            copy_queries(shared, queries, tokens, items, items_of_head);
    } else {
        more_registers<240>();
        Attention attention{shared, 0, group};
        Use use;  // of queries
        if (group == 1) attention.give_turn();
        for (int item = blockIdx.x; item < items; item += gridDim.x, ++use.n) {
            barrier_wait(shared.barrier(QUERIES_FULL, use.buffer()), use.full());
            attention.queries = shared.queries(use.buffer()) + group * ROWS * ROW_BYTES;
            attention.run();
            attention.release(QUERIES_FREE, use.buffer());
            const int first = item % items_of_head * QUERIES + group * ROWS + threadIdx.x / 32 % 4 * 16;
            attention.store(out + (i64)first * DIM + item / items_of_head * HEAD_DIM, tokens - first);
        }
    }
}
