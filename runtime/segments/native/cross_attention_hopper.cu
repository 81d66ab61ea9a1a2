// Cross-attention to text and image on Hopper: the sum of two softmaxes over the same queries, with wgmma.
//
// `arrange_keys` copies keys and values into tiles that wgmma reads from shared memory as they are, so one bulk copy
// brings one. Then one block of threads per multiprocessor takes items of 128 queries of a head, head after head. Its
// first warpgroup copies: one thread keys and values, three warps the queries of the item after this one. The two
// others have 64 queries each; while they multiply probabilities by a tile's values, they compute the next tile's
// softmax. cross_attention.py defines multiply_<N> (queries by N keys) and add_values. Macros besides block.cu's:
// TEXT_KEYS, IMAGE_KEYS.

constexpr int ROWS = 64;                   // queries of a warpgroup
constexpr int CONSUMERS = 2;               // warpgroups
constexpr int QUERIES = ROWS * CONSUMERS;  // of an item
constexpr int MOST_TILE = 128;             // keys
constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int SLAB_BYTES = 128;  // of a row: wgmma's swizzle spans 128 bytes, so a row lies in two slabs

template <int KEYS>
struct Tiles {  // equal ones, and one for the remaining keys; zeros are added up to a multiple of 16
    static constexpr int COUNT = (KEYS + MOST_TILE - 1) / MOST_TILE;
    static constexpr int SIZE = (KEYS + COUNT * 16 - 1) / (COUNT * 16) * 16;
    static constexpr int PADDED = COUNT * SIZE;
};
using Text = Tiles<TEXT_KEYS>;
using Image = Tiles<IMAGE_KEYS>;
constexpr int TILES = Text::COUNT + Image::COUNT;
constexpr int ALL_KEYS = Text::PADDED + Image::PADDED;

__host__ __device__ constexpr int size_of(int tile) { return tile < Text::COUNT ? Text::SIZE : Image::SIZE; }
__host__ __device__ constexpr int first_of(int tile) {
    return tile < Text::COUNT ? tile * Text::SIZE : Text::PADDED + (tile - Text::COUNT) * Image::SIZE;
}

// Shared memory
constexpr int STAGE = MOST_TILE * ROW_BYTES;  // keys or values of a tile
constexpr int QUERY_BYTES = QUERIES * ROW_BYTES;
constexpr int KEPT = 2 * QUERY_BYTES + 4 * STAGE;  // the text's result, as bf16: there are too few registers
#if IN_REGISTERS
constexpr int BARRIERS = KEPT;
#else
constexpr int BARRIERS = KEPT + QUERY_BYTES;
#endif

// Tiles of all heads: of each, the tiles of the text and then of the image; of each tile, its keys and then its values.
extern "C" __global__ void arrange_keys(const bf16* text_k, const bf16* text_v, const bf16* image_k,
                                        const bf16* image_v, u8* tiles) {
    constexpr int CHUNKS = ROW_BYTES / 16;
    EACH(i, (i64)HEADS * ALL_KEYS * 2 * CHUNKS) {
        const int chunk = i % CHUNKS, row = i / CHUNKS % ALL_KEYS;
        const bool values = i / (CHUNKS * ALL_KEYS) % 2;
        const i64 head = i / (CHUNKS * ALL_KEYS * 2);
        const bool text = row < Text::PADDED;
        const int key = text ? row : row - Text::PADDED, keys = text ? TEXT_KEYS : IMAGE_KEYS;
        const int tile = text ? key / Text::SIZE : Text::COUNT + key / Image::SIZE;
        const bf16* from = text ? (values ? text_v : text_k) : (values ? image_v : image_k);
        uint4 numbers = make_uint4(0, 0, 0, 0);
        if (key < keys) numbers = *(const uint4*)(from + (head * keys + key) * HEAD_DIM + chunk * 8);
        const int within = row - first_of(tile), size = size_of(tile);
        u8* to = tiles + (head * ALL_KEYS + first_of(tile)) * 2 * ROW_BYTES + values * size * ROW_BYTES
                 + chunk / 8 * size * SLAB_BYTES + within * SLAB_BYTES + ((chunk % 8 ^ within % 8) << 4);
        *(uint4*)to = numbers;
    }
}

// Barriers in shared memory: `arrive` by one thread, `wait` until the phase of that parity is over.

__device__ void set_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
__device__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(barrier) : "memory"); }
__device__ void wait(u32 barrier, u32 parity) {
#ifdef TRIAL
    const i64 begin = clock64();
#endif
    u32 done = 0;
    while (!done) {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#ifdef TRIAL
        if (clock64() - begin > 2000000000LL) __trap();
#endif
    }
}
__device__ void copy_bulk(u32 to, const u8* from, u32 bytes, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

struct Ring {  // stage and parity of the n-th use of two buffers
    u32 n = 0;
    __device__ u32 stage() const { return n & 1; }
    __device__ u32 full() const { return n >> 1 & 1; }
    __device__ u32 free() const { return full() ^ 1; }
};

struct Shared {
    u32 base;
    __device__ u32 queries(u32 stage) const { return base + stage * QUERY_BYTES; }
    __device__ u32 keys(u32 stage) const { return base + 2 * QUERY_BYTES + stage * STAGE; }
    __device__ u32 values(u32 stage) const { return keys(stage) + 2 * STAGE; }
    __device__ u32 barrier(int kind, u32 stage) const { return base + BARRIERS + (kind * 2 + stage) * 8; }
};
enum { QUERIES_FULL, QUERIES_FREE, KEYS_FULL, KEYS_FREE, VALUES_FULL, VALUES_FREE };

// wgmma's description of a matrix with 128-byte swizzle. `slab`: bytes from 64 columns to the next 64, which counts
// for values only.
__device__ u64 matrix(u32 address, u32 slab) {
#if VALUES_VARIANT == 1
    return (u64)(1 << 30 | slab >> 4) << 32 | (1024 >> 4) << 16 | address >> 4;
#else
    return (u64)(1 << 30 | 1024 >> 4) << 32 | (slab >> 4) << 16 | address >> 4;
#endif
}
__device__ u32 computed_here(u32 x) {  // keeps the compiler from computing all descriptions ahead, which takes registers
    asm volatile("" : "+r"(x));
    return x;
}

__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }
template <int N>
__device__ void written(float (&x)[N][4]) {  // reads of x stay behind the wait before
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(x[n][i]) :: "memory");
}
template <int N>
__device__ void written(u32 (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(x[n][i]) :: "memory");
}

__device__ void keep(u32 to, u32 x) { asm volatile("st.shared.u32 [%0], %1;" :: "r"(to), "r"(x) : "memory"); }
__device__ u32 kept(u32 from) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

struct Softmax {  // A thread has two rows, each shared by four threads.
    float out[HEAD_DIM / 8][4];
    float most[2], sum[2];

    __device__ float inverse(int half) const {
        float whole = sum[half];
        whole += __shfl_xor_sync(~0u, whole, 1);
        return 1.0f / (whole + __shfl_xor_sync(~0u, whole, 2));
    }

    // Logits to probabilities; the factors for earlier ones are left in `shrink`.
    template <int N>
    __device__ void next(float (&s)[N / 8][4], int valid, bool begin, float (&shrink)[2]) {
        if (valid < N) {
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (n * 8 + threadIdx.x % 4 * 2 + i % 2 >= valid) s[n][i] = -infinity();
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = begin ? -infinity() : most[half];
#pragma unroll
            for (int n = 0; n < N / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            shrink[half] = begin ? 0 : power_of_2((most[half] - largest) * LOG2_E);
            most[half] = largest;
            float added = 0;
            const float offset = largest * LOG2_E;
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    s[n][i] = power_of_2(s[n][i] * LOG2_E - offset);
                    added += s[n][i];
                }
            sum[half] = begin ? added : sum[half] * shrink[half] + added;
        }
    }
};

#if PINGPONG
__device__ void my_turn(int group) { asm volatile("bar.sync %0, 256;" :: "r"(group + 1) : "memory"); }
__device__ void your_turn(int group) { asm volatile("bar.arrive %0, 256;" :: "r"(2 - group) : "memory"); }
#else
__device__ void my_turn(int) {}
__device__ void your_turn(int) {}
#endif

struct Attention {  // of a warpgroup; a thread's part
    Shared shared;
    u32 queries, text;  // addresses in shared memory
    int group;
    Ring ring;
    Softmax x;
#if IN_REGISTERS
    u32 kept_text[HEAD_DIM / 8][2];
#define KEEP(n, half, x) (kept_text[n][half] = (x))
#define TAKE(n, half) a.kept_text[n][half]
#else
#define KEEP(n, half, x) keep(text + (2 * (n) + half) * 512, x)
#define TAKE(n, half) kept(text + (2 * (n) + half) * 512)
#endif

    template <int N>
    __device__ void multiply(float (&s)[N / 8][4]) {
        const u32 q = computed_here(queries), k = computed_here(shared.keys(ring.stage()));
        wait(shared.barrier(KEYS_FULL, ring.stage()), ring.full());
        my_turn(group);
        begin_products();
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d)
            Multiply<N>::run(s, matrix(q + d / 4 * ROWS * SLAB_BYTES + d % 4 * 32, 16),
                             matrix(k + d / 4 * N * SLAB_BYTES + d % 4 * 32, 16), d > 0);
        end_products();
    }
    template <int N>
    __device__ void add(u32 (&p)[N / 16][4], const Ring& before, bool begins) {
        wait(shared.barrier(VALUES_FULL, before.stage()), before.full());
        begin_products();
        add_values<N>(x.out, p, computed_here(shared.values(before.stage())), !begins);
        end_products();
    }
    __device__ void release(int kind, const Ring& of) {
        if (threadIdx.x % 32 == 0) arrive(shared.barrier(kind, of.stage()));
    }
    template <int N>
    __device__ static void pack(const float (&s)[N / 8][4], u32 (&p)[N / 16][4]) {
#pragma unroll
        for (int n = 0; n < N / 16; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) p[n][i] = pack_bf16(s[2 * n + i / 2][i % 2 * 2], s[2 * n + i / 2][i % 2 * 2 + 1]);
        written(p);
    }

    template <int N>
    __device__ void first(u32 (&p)[N / 16][4], int valid) {
        float s[N / 8][4], shrink[2];
        multiply<N>(s);
        your_turn(group);
        wait_for_products<0>();
        written(s);
        release(KEYS_FREE, ring);
        x.next<N>(s, valid, true, shrink);
        pack<N>(s, p);
        ++ring.n;
    }
    // Adds the values of the tile before while it computes the probabilities of the next one. 
    template <int BEFORE, int N>
    __device__ void step(u32 (&earlier)[BEFORE / 16][4], u32 (&p)[N / 16][4], int valid, bool earlier_begins, bool begins) {
        float s[N / 8][4], shrink[2];
        const Ring before{ring.n - 1};
        multiply<N>(s);
        add<BEFORE>(earlier, before, earlier_begins);
        your_turn(group);
        wait_for_products<1>();
        written(s);
        release(KEYS_FREE, ring);
        const float inverse[2] = {begins ? x.inverse(0) : 0, begins ? x.inverse(1) : 0};
        x.next<N>(s, valid, begins, shrink);
        wait_for_products<0>();
        written(x.out);
        release(VALUES_FREE, before);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (begins)
                    KEEP(n, half,
                         pack_bf16(x.out[n][2 * half] * inverse[half], x.out[n][2 * half + 1] * inverse[half]));
                else
                    x.out[n][2 * half] *= shrink[half], x.out[n][2 * half + 1] *= shrink[half];
        pack<N>(s, p);
        written(x.out);
        ++ring.n;
    }
    template <int N>
    __device__ void last(u32 (&p)[N / 16][4]) {
        const Ring before{ring.n - 1};
        add<N>(p, before, false);
        wait_for_products<0>();
        written(x.out);
        release(VALUES_FREE, before);
    }
    __device__ void run() {
        constexpr int TEXT = Text::SIZE, IMAGE = Image::SIZE;
        u32 p[TEXT / 16][4], r[IMAGE / 16][4];
        first<TEXT>(p, TEXT_KEYS);
#pragma unroll 1
        for (int tile = 1; tile < Text::COUNT; ++tile)
            step<TEXT, TEXT>(p, p, TEXT_KEYS - tile * TEXT, tile == 1, false);
        step<TEXT, IMAGE>(p, r, IMAGE_KEYS, Text::COUNT == 1, true);
#pragma unroll 1
        for (int tile = 1; tile < Image::COUNT; ++tile)
            step<IMAGE, IMAGE>(r, r, IMAGE_KEYS - tile * IMAGE, tile == 1, false);
        last<IMAGE>(r);
    }
};

extern "C" __global__ void __launch_bounds__(128 + CONSUMERS * 128, 1)
cross_attention_hopper(const bf16* queries, const u8* tiles, bf16* out, int tokens) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared shared{shared_address(memory)};
    const int items_of_head = (tokens + QUERIES - 1) / QUERIES, items = items_of_head * HEADS;
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < 2; ++stage) {
            set_barrier(shared.barrier(QUERIES_FULL, stage), 96);
            set_barrier(shared.barrier(QUERIES_FREE, stage), CONSUMERS * 4);
            set_barrier(shared.barrier(KEYS_FULL, stage), 1);
            set_barrier(shared.barrier(KEYS_FREE, stage), CONSUMERS * 4);
            set_barrier(shared.barrier(VALUES_FULL, stage), 1);
            set_barrier(shared.barrier(VALUES_FREE, stage), CONSUMERS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // -1: the one that copies
    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x == 0) {
            Ring ring;
            for (int item = blockIdx.x; item < items; item += gridDim.x) {
                const u8* from = tiles + (i64)(item / items_of_head) * ALL_KEYS * 2 * ROW_BYTES;
#pragma unroll 1
                for (int tile = 0; tile < TILES; ++tile, ++ring.n) {
                    const u32 bytes = size_of(tile) * ROW_BYTES, stage = ring.stage();
                    wait(shared.barrier(KEYS_FREE, stage), ring.free());
                    copy_bulk(shared.keys(stage), from, bytes, shared.barrier(KEYS_FULL, stage));
                    wait(shared.barrier(VALUES_FREE, stage), ring.free());
                    copy_bulk(shared.values(stage), from + bytes, bytes, shared.barrier(VALUES_FULL, stage));
                    from += 2 * bytes;
                }
            }
        } else if (threadIdx.x >= 32) {
            Ring ring;
            for (int item = blockIdx.x; item < items; item += gridDim.x, ++ring.n) {
                const int head = item / items_of_head, first = item % items_of_head * QUERIES;
                const u32 stage = ring.stage(), to = shared.queries(stage);
                wait(shared.barrier(QUERIES_FREE, stage), ring.free());
#pragma unroll 2
                for (int i = threadIdx.x - 32; i < QUERIES * 16; i += 96) {
                    const int row = i / 16, chunk = i % 16;
                    const bool there = first + row < tokens;
                    const bf16* source = queries + (i64)(there ? first + row : 0) * DIM + head * HEAD_DIM + chunk * 8;
                    const u32 at = to + (row / ROWS * 2 + chunk / 8) * ROWS * SLAB_BYTES + row % ROWS * SLAB_BYTES
                                   + ((chunk % 8 ^ row % 8) << 4);
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                                 :: "r"(at), "l"(source), "r"(there ? 16 : 0) : "memory");
                }
                end_of_copies();
                wait_for_copies<0>();
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what cp.async wrote
                arrive(shared.barrier(QUERIES_FULL, stage));
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Ring items_ring;
#if PINGPONG
        if (group == 1) your_turn(group);
#endif
        const u32 text = shared.base + KEPT + (threadIdx.x - 128) / 128 * (QUERY_BYTES / 2) + threadIdx.x % 128 * 4;
        Attention a{shared, 0, text, group};
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        for (int item = blockIdx.x; item < items; item += gridDim.x, ++items_ring.n) {
            const u32 stage = items_ring.stage();
            wait(shared.barrier(QUERIES_FULL, stage), items_ring.full());
            a.queries = shared.queries(stage) + group * ROWS * ROW_BYTES;
            a.run();
            Softmax& x = a.x;
            if (lane == 0) arrive(shared.barrier(QUERIES_FREE, stage));
            const i64 head = item / items_of_head;
            const int first = item % items_of_head * QUERIES + group * ROWS + warp * 16 + lane / 4;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float inverse = x.inverse(half);
                const i64 token = first + half * 8;
                bf16* to = out + token * DIM + head * HEAD_DIM;
#if STORE_VARIANT == 1
#pragma unroll
                for (int four = 0; four < HEAD_DIM / 32; ++four) {
                    u32 v[4];  // four threads swap, so that each stores 16 bytes
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int n = four * 4 + i;
                        v[i] = pack_bf16(x.out[n][2 * half] * inverse + low(TAKE(n, half)),
                                         x.out[n][2 * half + 1] * inverse + high(TAKE(n, half)));
                    }
                    const bool odd = lane & 1, upper = lane & 2;
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
                    if (token < tokens) *(uint4*)(to + four * 32 + lane % 4 * 8) = make_uint4(v[0], v[1], v[2], v[3]);
                }
#else
                if (token < tokens)
#pragma unroll
                    for (int n = 0; n < HEAD_DIM / 8; ++n)
                        *(u32*)(to + n * 8 + lane % 4 * 2) =
                            pack_bf16(x.out[n][2 * half] * inverse + low(TAKE(n, half)),
                                      x.out[n][2 * half + 1] * inverse + high(TAKE(n, half)));
#endif
            }
        }
    }
}
