// Self-attention on Hopper (sm_90a): wgmma, bulk copies, a producer and two consumers.
//
// A block takes 128 queries of one head. One thread copies tiles of keys and values into a ring; each of two warpgroups
// computes 64 queries against every tile of KEYS keys. The scores of a tile are multiplied while those of the tile before
// are being turned into weights and multiplied with the values. The tiles lie in global memory as they lie in shared
// memory (tiles.cu), so that a tile is one copy.
//
// Scores are int8 products (QK 0) or bf16 (1). Weights and values are E4M3 (PV 0) or bf16 (1). Other macros: KEYS (128, 160
// or 192), STAGES of the ring, LISTS (1: with lists of tiles), FLUSHED (tiles, below).
//
// HALVES 1 is another order of the same work: half a tile at a time. While the weights of a half are computed, the scores
// of the half after it and the products of the half before it with the values are multiplied. Weights are computed with
// the maximum known before, and once more if one of them may not fit into E4M3, so that no maximum is looked for in most
// halves. HELD_Q 1 keeps int8 queries in registers; SPREAD 1 starts the products with the values one by one, between weights.

#ifndef HALVES
#define HALVES 0
#endif
#ifndef HELD_Q
#define HELD_Q (HALVES == 1 && QK == 0 && PV == 0)
#endif
#ifndef SPREAD
#define SPREAD 0
#endif
#ifndef FLUSHED
#define FLUSHED 4
#endif

constexpr int QUERIES = 128, DIM = 128;
constexpr int ROW = 128;                          // bytes of a row of q and k in shared memory, swizzled
constexpr int PARTS = QK == 1 ? 2 : 1;            // rows of a token of q or k
constexpr int SLICE = PV == 1 ? 16 : 32;          // keys of v that are multiplied at a time: 32 bytes of each channel
constexpr int SLICES = KEYS / SLICE, SLICE_BYTES = DIM * 32;
// In the tensor core a long sum of E4M3 products loses bits: where all values point one way a result was 35 % too small.
// So the sums of FLUSHED tiles are added up in float32, in shared memory.
constexpr int FLUSH = PV == 0 ? FLUSHED : 0, KEPT_BYTES = FLUSH ? 64 * DIM * 4 : 0;  // of a warpgroup
constexpr int Q_PART = QUERIES * ROW, K_PART = KEYS * ROW;
constexpr int Q_BYTES = PARTS * Q_PART, K_BYTES = PARTS * K_PART, V_BYTES = SLICES * SLICE_BYTES;
constexpr int STEP = HALVES ? KEYS / 2 : KEYS;     // keys whose weights are computed together
constexpr int STEP_SLICES = STEP / SLICE, SCORES = STEP / 2;  // scores: of a thread
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LIFT = 5.0f;      // weights are at most 2^(LIFT + LAG): E4M3 ends at 448
constexpr float LAG = 3.0f;       // a row's maximum may be so much larger than the one in use, in powers of two
constexpr float MAGIC = 12582912.0f;  // 2^23 + 2^22: the bits of MAGIC + n are those of MAGIC, plus n
constexpr int MAGIC_BITS = 0x4B400000;
constexpr int LEAST = (int)(0xFF800000u - 0x4B400000u);  // becomes -infinity

// Matrix products of a warpgroup. Operands in shared memory have swizzled rows of 128 or 32 bytes.

// The lower half of a descriptor has the address in units of 16 bytes, the upper half the layout.
constexpr u32 ROWS_OF_128 = 1u << 30 | 8 * 128 >> 4, ROWS_OF_32 = 3u << 30 | 8 * 32 >> 4;
__device__ u32 matrix(u32 address) { return (address & 0x3FFFF) >> 4 | 1u << 16; }
__device__ u64 descriptor(u32 matrix, u32 layout) { return (u64)layout << 32 | matrix; }

#define LIST32 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
    "%24,%25,%26,%27,%28,%29,%30,%31}"
#define LIST40 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
    "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39}"
#define LIST48 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
    "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47}"
#define LIST64 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
    "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
    "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define LIST80 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
    "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
    "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73," \
    "%74,%75,%76,%77,%78,%79}"
#define LIST96 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
    "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
    "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73," \
    "%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95}"
#define EIGHT(c, d, i) \
    c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define ALL32(c, d) EIGHT(c, d, 0), EIGHT(c, d, 8), EIGHT(c, d, 16), EIGHT(c, d, 24)
#define ALL40(c, d) ALL32(c, d), EIGHT(c, d, 32)
#define ALL48(c, d) ALL40(c, d), EIGHT(c, d, 40)
#define ALL64(c, d) ALL48(c, d), EIGHT(c, d, 48), EIGHT(c, d, 56)
#define ALL80(c, d) ALL64(c, d), EIGHT(c, d, 64), EIGHT(c, d, 72)
#define ALL96(c, d) ALL80(c, d), EIGHT(c, d, 80), EIGHT(c, d, 88)
#if KEYS == 128 && HALVES == 1
#define SHAPE "m64n64"
#define LIST LIST32
#define ALL ALL32
#define A "32"
#define B "33"
#define P "34"
#define A4 "{%32,%33,%34,%35}"
#define B4 "36"
#define P4 "37"
#elif KEYS == 160 && HALVES == 1
#define SHAPE "m64n80"
#define LIST LIST40
#define ALL ALL40
#define A "40"
#define B "41"
#define P "42"
#define A4 "{%40,%41,%42,%43}"
#define B4 "44"
#define P4 "45"
#elif KEYS == 192 && HALVES == 1
#define SHAPE "m64n96"
#define LIST LIST48
#define ALL ALL48
#define A "48"
#define B "49"
#define P "50"
#define A4 "{%48,%49,%50,%51}"
#define B4 "52"
#define P4 "53"
#elif KEYS == 128 && HALVES == 0
#define SHAPE "m64n128"
#define LIST LIST64
#define ALL ALL64
#define A "64"
#define B "65"
#define P "66"
#define A4 "{%64,%65,%66,%67}"
#define B4 "68"
#define P4 "69"
#elif KEYS == 160 && HALVES == 0
#define SHAPE "m64n160"
#define LIST LIST80
#define ALL ALL80
#define A "80"
#define B "81"
#define P "82"
#define A4 "{%80,%81,%82,%83}"
#define B4 "84"
#define P4 "85"
#else
#define SHAPE "m64n192"
#define LIST LIST96
#define ALL ALL96
#define A "96"
#define B "97"
#define P "98"
#define A4 "{%96,%97,%98,%99}"
#define B4 "100"
#define P4 "101"
#endif

// Keeps the compiler from using registers before the products that write them have ended.
__device__ void settled_scores(float (&d)[SCORES]) { asm volatile("" : ALL("+f", d) :: "memory"); }
__device__ void settled_scores(int (&d)[SCORES]) { asm volatile("" : ALL("+r", d) :: "memory"); }
__device__ void settled(float (&d)[64]) { asm volatile("" : ALL64("+f", d) :: "memory"); }

__device__ void multiply_scores(int (&d)[SCORES], u64 a, u64 b, int sum) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\n"
                 "wgmma.mma_async.sync.aligned." SHAPE "k32.s32.s8.s8 " LIST ", %" A ", %" B ", p;\n}"
                 : ALL("+r", d) : "l"(a), "l"(b), "r"(sum));
}
__device__ void multiply_scores_held(int (&d)[SCORES], const u32 (&a)[4], u64 b, int sum) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P4 ", 0;\n"
                 "wgmma.mma_async.sync.aligned." SHAPE "k32.s32.s8.s8 " LIST ", " A4 ", %" B4 ", p;\n}"
                 : ALL("+r", d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(sum));
}
__device__ void multiply_scores_bf16(float (&d)[SCORES], u64 a, u64 b, int sum) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\n"
                 "wgmma.mma_async.sync.aligned." SHAPE "k16.f32.bf16.bf16 " LIST ", %" A ", %" B ", p, 1, 1, 0, 0;\n}"
                 : ALL("+f", d) : "l"(a), "l"(b), "r"(sum));
}
__device__ void multiply_values(float (&d)[64], const u32 (&a)[4], u64 b, int sum) {
#if PV == 0
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " LIST64
                 ", {%64,%65,%66,%67}, %68, p, 1, 1;\n}"
                 : ALL64("+f", d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(sum));
#else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " LIST64
                 ", {%64,%65,%66,%67}, %68, p, 1, 1, 0;\n}"
                 : ALL64("+f", d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(sum));
#endif
}

#if QK == 0
typedef int Score;
#else
typedef float Score;
#endif

// A score as a number of MAGIC + n, or as it is.
__device__ float number(int s) { return __int_as_float(s + MAGIC_BITS); }
__device__ float number(float s) { return s; }
__device__ float plain(int s) { return (float)s; }
__device__ float plain(float s) { return s; }
__device__ int larger(int a, int b) { return max(a, b); }
__device__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ Score least() {
#if QK == 0
    return LEAST;
#else
    return -infinity();
#endif
}

__device__ float power_of_2(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // volatile: before the wait for the values
    return y;
}
__device__ u32 load_word(u32 from) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}
__device__ void load_shared(float (&x)[4], u32 from) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(from) : "memory");
}
__device__ void store_shared(u32 to, const float (&x)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

// Never stores, for x is positive. ptxas would else put the work that leads to x behind the next wait for products.
__device__ void needed(float x, u32 address) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}"
                 :: "f"(x), "r"(address) : "memory");
}

struct Rows {  // of a thread: two, shared by four threads
    float most[2], sum[2], scale[2];
};

#if HALVES == 0
// A tile's scores to weights, in place (`weights`); true if what was added up before must be shrunk by `shrink`.
template <bool FIRST>
__device__ bool soften(Score (&s)[SCORES], float (&weights)[SCORES], Rows& r, float key_scale, int valid,
                       float (&shrink)[2]) {
    if (valid < KEYS) {
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < SCORES; ++i)
            if (i / 4 * 8 + column + i % 2 >= valid) s[i] = least();
    }
    Score most[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) most[i / 2 % 2] = larger(most[i / 2 % 2], s[i]);
    float factor[2], high[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        most[half] = larger(most[half], __shfl_xor_sync(~0u, most[half], 1));
        most[half] = larger(most[half], __shfl_xor_sync(~0u, most[half], 2));
        factor[half] = r.scale[half] * key_scale;
        high[half] = plain(most[half]) * factor[half];
    }
    bool grown = false;
    if (FIRST) {
        r.most[0] = high[0], r.most[1] = high[1];
    } else {
        shrink[0] = shrink[1] = 1;
        grown = __any_sync(~0u, high[0] > r.most[0] + LAG || high[1] > r.most[1] + LAG);
        if (grown) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float most = fmaxf(r.most[half], high[half]);
                shrink[half] = power_of_2(r.most[half] - most);
                r.most[half] = most;
                r.sum[half] *= shrink[half];
            }
        }
    }
    float offset[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
        offset[half] = LIFT - r.most[half] - (QK == 0 ? MAGIC * factor[half] : 0.0f);
    float sums[2][2] = {};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
        const int half = i / 2 % 2;
        const float x = fmaf(number(s[i]), factor[half], offset[half]);
        weights[i] = power_of_2(x);
        sums[half][i % 2] += weights[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) r.sum[half] += sums[half][0] + sums[half][1];
    return grown;
}

__device__ void pack(const float (&w)[SCORES], u32 (&a)[STEP_SLICES][4]) {
#pragma unroll
    for (int g = 0; g < STEP_SLICES; ++g)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i % 2 * 2;
#if PV == 1
            const float* from = w + (2 * g + i / 2) * 4 + half;
            a[g][i] = pack_bf16(from[0], from[1]);
#else
            const float* from = w + (4 * g + i / 2 * 2) * 4 + half;
            a[g][i] = pack_e4m3(from[0], from[1]) | pack_e4m3(from[4], from[5]) << 16;
#endif
        }
}

#else
// Of a row's four sums, added up over 12 weights at most, one exceeds this before a weight exceeds 448. With the true
// maximum they are 12 * 2^LIFT at most.
constexpr float LIMIT = 448.0f;

__device__ void hide(Score (&s)[SCORES], int valid) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < SCORES; ++i)
        if (i / 4 * 8 + column + i % 2 >= valid) s[i] = least();
}

// The largest score of each row, as a power of two.
__device__ void largest(const Score (&s)[SCORES], const float (&factor)[2], float (&high)[2]) {
    Score most[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 4; i < SCORES; ++i) most[i % 4] = larger(most[i % 4], s[i]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Score whole = larger(most[2 * half], most[2 * half + 1]);
        whole = larger(whole, __shfl_xor_sync(~0u, whole, 1));
        whole = larger(whole, __shfl_xor_sync(~0u, whole, 2));
        high[half] = plain(whole) * factor[half];
    }
}

// Scores to packed weights and their sums, with the rows' maxima as they are. AGAIN 1: of the same scores, which are made
// numbers in another way, or ptxas would keep them for it in registers.
// `between` is called before every slice.
template <bool AGAIN, class Between>
__device__ void weigh(const Score (&s)[SCORES], const float (&factor)[2], const Rows& r, u32 (&a)[STEP_SLICES][4],
                      float (&sums)[2][2], Between between) {
    float offset[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        offset[half] = LIFT - r.most[half] - (QK == 0 && !AGAIN ? MAGIC * factor[half] : 0.0f);
        sums[half][0] = sums[half][1] = 0;
    }
    auto weight = [&](int i) {
        const int half = i / 2 % 2;
        const float n = AGAIN ? plain(s[i]) : number(s[i]);
        float y = power_of_2(fmaf(n, factor[half], offset[half]));
        if (AGAIN && s[i] == least()) y = 0;  // a plain int is not -infinity
        sums[half][i % 2] += y;
        return y;
    };
#pragma unroll
    for (int g = 0; g < STEP_SLICES; ++g) {
        between(g);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = (PV == 1 ? 2 * g + i / 2 : 4 * g + i / 2 * 2) * 4 + i % 2 * 2;
            const float first = weight(at), second = weight(at + 1);
#if PV == 1
            a[g][i] = pack_bf16(first, second);
#else
            const float third = weight(at + 4), fourth = weight(at + 5);
            a[g][i] = pack_e4m3(first, second) | pack_e4m3(third, fourth) << 16;
#endif
        }
    }
}

// Scores of half a tile to packed weights; true if what was added up before must be shrunk by `shrink`.
template <bool FIRST, class Between>
__device__ bool soften(Score (&s)[SCORES], u32 (&a)[STEP_SLICES][4], Rows& r, float key_scale, int valid,
                       float (&shrink)[2], Between between) {
    if (valid < STEP) hide(s, valid);
    const float factor[2] = {r.scale[0] * key_scale, r.scale[1] * key_scale};
    float sums[2][2];
    bool grown = false;
    if (FIRST) {
        largest(s, factor, r.most);
        weigh<false>(s, factor, r, a, sums, between);
    } else {
        shrink[0] = shrink[1] = 1;
        weigh<false>(s, factor, r, a, sums, between);
        grown = __any_sync(~0u, fmaxf(fmaxf(sums[0][0], sums[0][1]), fmaxf(sums[1][0], sums[1][1])) > LIMIT);
        if (grown) {
            float high[2];
            largest(s, factor, high);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float most = fmaxf(r.most[half], high[half]);
                shrink[half] = power_of_2(r.most[half] - most);
                r.most[half] = most;
                r.sum[half] *= shrink[half];
            }
            weigh<true>(s, factor, r, a, sums, [](int) {});
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) r.sum[half] += sums[half][0] + sums[half][1];
    return grown;
}
#endif

// Queries of a warpgroup: where they are in shared memory, or as the tensor core takes them from registers.
#if HELD_Q
typedef u32 Queries[4][4];
__device__ void hold(Queries& q, u32 from) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            q[step][i] = load_word(from + (row + i % 2 * 8) * ROW + ((step * 2 + i / 2 ^ row % 8) << 4) +
                                   threadIdx.x % 4 * 4);
}
#else
typedef u32 Queries;
__device__ void hold(Queries& q, u32 from) { q = matrix(from); }
#endif

__device__ void scores(Score (&s)[SCORES], const Queries& q, u32 k) {
#pragma unroll
    for (int step = 0; step < 4 * PARTS; ++step) {
        const u64 b = descriptor(k + (step / 4 * K_PART + step % 4 * 32) / 16, ROWS_OF_128);
#if HELD_Q
        multiply_scores_held(s, q[step], b, step > 0);
#else
        const u64 a = descriptor(q + (step / 4 * Q_PART + step % 4 * 32) / 16, ROWS_OF_128);
#if QK == 0
        multiply_scores(s, a, b, step > 0);
#else
        multiply_scores_bf16(s, a, b, step > 0);
#endif
#endif
    }
}

__device__ void slice_of_values(float (&o)[64], const u32 (&a)[4], u32 v, int g, bool sum) {
    multiply_values(o, a, descriptor(v + g * SLICE_BYTES / 16, ROWS_OF_32), sum || g > 0);
}
__device__ void values(float (&o)[64], const u32 (&a)[STEP_SLICES][4], u32 v, bool sum) {
#pragma unroll
    for (int g = 0; g < STEP_SLICES; ++g) slice_of_values(o, a[g], v, g, sum);
}

// q [heads, tiles of 128 queries, parts, 128, 128 bytes]; k [heads, tiles of KEYS, parts, KEYS, 128 bytes]; v [heads,
// tiles, slices, 128 channels, 32 bytes]. query_scale [heads, tiles * 128] with log2(e), key_scale [heads, tiles],
// value_scale and value_mean [heads, 128]. lists [heads, tiles of queries, tiles], counts [heads, tiles of queries]. out
// bf16 [tokens, heads * 128]. shift and lse float32 [heads, tokens]; a null lse is not written. Grid (tiles of queries,
// heads).
extern "C" __global__ void __launch_bounds__(384, 1)
attend(const u8* q, const u8* k, const u8* v, const float* query_scale, const float* key_scale,
       const float* value_scale, const float* value_mean, const int* lists, const int* counts, const float* shift,
       bf16* out, float* lse, int tokens) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int heads = gridDim.y, head = blockIdx.y, tiles = (tokens + KEYS - 1) / KEYS;
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    const u32 q_at = base, k_at = q_at + Q_BYTES, v_at = k_at + STAGES * K_BYTES;
    const u32 kept_at = v_at + STAGES * V_BYTES, barriers = kept_at + 2 * KEPT_BYTES;
    const u32 q_full = barriers, k_full = barriers + 8, k_free = k_full + STAGES * 8, v_full = k_free + STAGES * 8,
              v_free = v_full + STAGES * 8;
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(k_full + i * 8, 1), barrier_init(v_full + i * 8, 1);
            barrier_init(k_free + i * 8, 8), barrier_init(v_free + i * 8, 8);
        }
        barriers_ready();
    }
    __syncthreads();
    const i64 row = (i64)head * gridDim.x + blockIdx.x;
    const int count = LISTS ? counts[row] : tiles;
    const int* list = lists + row * tiles;
    auto number_of = [&](int i) { return LISTS ? list[i] : i; };
    if (threadIdx.x < 128) {
        fewer_registers<24>();
        if (threadIdx.x == 0) {
            barrier_expect(q_full, Q_BYTES);
            copy_bulk(q_at, q + row * Q_BYTES, Q_BYTES, q_full);
            for (int i = 0; i < count; ++i) {
                const i64 tile = (i64)head * tiles + number_of(i);
                const int stage = i % STAGES;
                const u32 phase = i / STAGES % 2 ^ 1;
                barrier_wait(k_free + stage * 8, phase);
                barrier_expect(k_full + stage * 8, K_BYTES);
                copy_bulk(k_at + stage * K_BYTES, k + tile * K_BYTES, K_BYTES, k_full + stage * 8);
                barrier_wait(v_free + stage * 8, phase);
                barrier_expect(v_full + stage * 8, V_BYTES);
                copy_bulk(v_at + stage * V_BYTES, v + tile * V_BYTES, V_BYTES, v_full + stage * 8);
            }
        }
    } else {
        more_registers<240>();
        const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // the compiler sees one number a warp
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 all_k = matrix(k_at), all_v = matrix(v_at);
        const int first = blockIdx.x * QUERIES + group * 64 + warp * 16 + lane / 4;
        const float* scales = key_scale + (i64)head * tiles;
        Rows r;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            r.scale[half] = query_scale[row * QUERIES + first - blockIdx.x * QUERIES + half * 8];
            r.sum[half] = 0;
        }
        float o[64], shrink[2] = {1, 1};
#pragma unroll
        for (int i = 0; i < 64; ++i) o[i] = 0;
        auto valid = [&](int tile) { return tokens - tile * KEYS; };
        const u32 my_kept = kept_at + group * KEPT_BYTES + threadIdx.x % 128 * 16;
        // ptxas must not see that sums begin at zero again. It would give the next product a predicate, "add nothing", that
        // depends on `grown`; the tensor core takes it from one warp for all four, and the others' sums are lost or doubled.
        const float nought = HALVES ? __int_as_float(tokens >> 31) : 0.0f;
        auto keep = [&]() {  // and shrinks them
#pragma unroll
            for (int n = 0; n < 64; n += 4) {
                float x[4];
                load_shared(x, my_kept + n * 512);
                for (int e = 0; e < 4; ++e) x[e] = (x[e] + o[n + e]) * shrink[e / 2], o[n + e] = nought;
                store_shared(my_kept + n * 512, x);
            }
        };
        if (FLUSH) {
            const float none[4] = {};
#pragma unroll
            for (int n = 0; n < 64; n += 4) store_shared(my_kept + n * 512, none);
        }
        auto shrunk = [&]() {
            if (FLUSH) return keep();
#pragma unroll
            for (int n = 0; n < 64; ++n) o[n] *= shrink[n / 2 % 2];
        };
        const int turn = HALVES ? group * FLUSH / 2 : 0;  // one warpgroup multiplies while the other one adds up
        auto due = [&](int i) { return FLUSH > 0 && (i + turn) % (FLUSH > 0 ? FLUSH : 1) == 0; };
        int tile = number_of(0), stage = 0, phase = 0;
        float key = scales[tile], next_key = count > 1 ? scales[number_of(1)] : 0.0f;
        Queries my_q;
        barrier_wait(q_full, 0);
        hold(my_q, q_at + group * 64 * ROW);
        barrier_wait(k_full, 0);
        wgmma_fence();
#if HALVES == 0
        Score s[SCORES];
        float w[SCORES];
        u32 a[STEP_SLICES][4];
        scores(s, my_q, all_k);
        wgmma_commit();
        wgmma_wait<0>();
        settled_scores(s);
        if (lane == 0) barrier_arrive(k_free);
        soften<true>(s, w, r, key, valid(tile), shrink);
        pack(w, a);
        for (int i = 1; i < count; ++i) {
            const int before = stage, phase_before = phase;
            if (++stage == STAGES) stage = 0, phase ^= 1;
            tile = number_of(i);
            key = next_key;
            if (i + 1 < count) next_key = scales[number_of(i + 1)];
            barrier_wait(k_full + stage * 8, phase);
            barrier_wait(v_full + before * 8, phase_before);
            wgmma_fence();
            scores(s, my_q, all_k + stage * (K_BYTES / 16));
            wgmma_commit();
            values(o, a, all_v + before * (V_BYTES / 16), true);
            wgmma_commit();
            wgmma_wait<1>();
            settled_scores(s);
            if (lane == 0) barrier_arrive(k_free + stage * 8);
            const bool grown = soften<false>(s, w, r, key, valid(tile), shrink);
            settled_scores(w);
            needed(r.sum[0] + r.sum[1], q_full);
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(v_free + before * 8);
            settled(o);
            if (grown || due(i)) shrunk();
            pack(w, a);
        }
        barrier_wait(v_full + stage * 8, phase);
        wgmma_fence();
        values(o, a, all_v + stage * (V_BYTES / 16), true);
        wgmma_commit();
        wgmma_wait<0>();
        settled(o);
#else
        Score s0[SCORES], s1[SCORES];  // of both halves of a tile
        u32 a0[STEP_SLICES][4], a1[STEP_SLICES][4];
        constexpr int K_HALF = STEP * ROW / 16, V_HALF = STEP_SLICES * SLICE_BYTES / 16;
        scores(s0, my_q, all_k);
        wgmma_commit();
        wgmma_wait<0>();
        settled_scores(s0);
        wgmma_fence();
        scores(s1, my_q, all_k + K_HALF);
        wgmma_commit();
        soften<true>(s0, a0, r, key, valid(tile), shrink, [](int) {});
        wgmma_wait<0>();
        settled_scores(s1);
        if (lane == 0) barrier_arrive(k_free);
        // Nothing is in flight at the loop's end: ptxas would else have all products wait for each other.
        for (int i = 1; i < count; ++i) {
            const int before = stage, phase_before = phase, tile_before = tile;
            const float key_before = key;
            if (++stage == STAGES) stage = 0, phase ^= 1;
            tile = number_of(i);
            key = next_key;
            if (i + 1 < count) next_key = scales[number_of(i + 1)];
            const u32 k_now = all_k + stage * (K_BYTES / 16), v_now = all_v + before * (V_BYTES / 16);
            barrier_wait(k_full + stage * 8, phase);
            barrier_wait(v_full + before * 8, phase_before);
            wgmma_fence();
            scores(s0, my_q, k_now);
            wgmma_commit();
            if (!SPREAD) values(o, a0, v_now, true), wgmma_commit();
            bool grown = soften<false>(s1, a1, r, key_before, valid(tile_before) - STEP, shrink, [&](int g) {
                if (SPREAD) slice_of_values(o, a0[g], v_now, g, true);
                if (SPREAD && g == STEP_SLICES - 1) wgmma_commit();
            });
            needed(r.sum[0] + r.sum[1], q_full);
            wgmma_wait<0>();
            settled_scores(s0);
            settled(o);
            if (grown) shrunk();
            wgmma_fence();
            scores(s1, my_q, k_now + K_HALF);
            wgmma_commit();
            if (!SPREAD) values(o, a1, v_now + V_HALF, true), wgmma_commit();
            grown = soften<false>(s0, a0, r, key, valid(tile), shrink, [&](int g) {
                if (SPREAD) slice_of_values(o, a1[g], v_now + V_HALF, g, true);
                if (SPREAD && g == STEP_SLICES - 1) wgmma_commit();
            });
            needed(r.sum[0] + r.sum[1], q_full);
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(k_free + stage * 8), barrier_arrive(v_free + before * 8);
            settled_scores(s1);
            settled(o);
            if (grown || due(i)) shrunk();
        }
        const u32 last_v = all_v + stage * (V_BYTES / 16);
        barrier_wait(v_full + stage * 8, phase);
        wgmma_fence();
        values(o, a0, last_v, true);
        wgmma_commit();
        const bool grown = soften<false>(s1, a1, r, key, valid(tile) - STEP, shrink, [](int) {});
        wgmma_wait<0>();
        settled(o);
        if (grown) shrunk();
        wgmma_fence();
        values(o, a1, last_v + V_HALF, true);
        wgmma_commit();
        wgmma_wait<0>();
        settled(o);
#endif
        if (FLUSH) {
#pragma unroll
            for (int n = 0; n < 64; n += 4) {
                float x[4];
                load_shared(x, my_kept + n * 512);
                for (int e = 0; e < 4; ++e) o[n + e] += x[e];
            }
        }
        const float* means = value_mean + head * DIM + lane % 4 * 2;
        const float* factors = value_scale + head * DIM + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = r.sum[half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int token = first + half * 8;
            const float inverse = 1.0f / sum;
            if (token < tokens) {
                bf16* to = out + ((i64)token * heads + head) * DIM + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < 16; ++n) {
                    const float2 factor = *(const float2*)(factors + n * 8), mean = *(const float2*)(means + n * 8);
                    *(u32*)(to + n * 8) = pack_bf16(o[n * 4 + half * 2] * inverse * factor.x + mean.x,
                                                    o[n * 4 + half * 2 + 1] * inverse * factor.y + mean.y);
                }
                if (lse && lane % 4 == 0) {
                    const i64 at = (i64)head * tokens + token;
                    lse[at] = (r.most[half] - LIFT + __log2f(sum)) / LOG2_E + shift[at];
                }
            }
        }
    }
}
