// Self-attention on Hopper (sm_90a), sizes and products; hopper.cu says how it works. The products are wgmma, of 64 queries
// of a warpgroup. Operands in shared memory have swizzled rows of 128 or 32 bytes.
//
// Scores are int8 products (QK 0) or bf16 (1). Weights and values are E4M3 (PV 0) or bf16 (1). Other macros: KEYS of a tile
// (96, 128 or 192), STAGES of the ring.

constexpr int CONSUMERS = PV == 1 ? 2 : 3;         // warpgroups that compute
constexpr int QUERIES = 64 * CONSUMERS, DIM = 128;
constexpr int ROW = 128;                          // bytes of a row of q and k in shared memory, swizzled
constexpr int PARTS = QK == 1 ? 2 : 1;            // rows of a token of q or k
constexpr int SLICE = PV == 1 ? 16 : 32;          // keys of v that are multiplied at a time: 32 bytes of each channel
constexpr int SLICES = KEYS / SLICE, SLICE_BYTES = DIM * 32;
// In the tensor core a long sum of E4M3 products loses bits: where all values point one way a result was 35 % too small.
// So the sums of some steps are added up in float32, in shared memory.
constexpr int FLUSH = 12, KEPT_BYTES = 64 * DIM * 4;  // steps; of a warpgroup
constexpr int Q_PART = QUERIES * ROW, K_PART = KEYS * ROW;
constexpr int Q_BYTES = PARTS * Q_PART, K_BYTES = PARTS * K_PART, V_BYTES = SLICES * SLICE_BYTES;
constexpr int STEP = 96, STEP_SLICES = STEP / SLICE, SCORES = STEP / 2;  // keys multiplied together; scores of a thread

#if QK == 0
typedef int Score;
#else
typedef float Score;
#endif

// The lower half of a descriptor has the address in units of 16 bytes, the upper half the layout.
constexpr u32 ROWS_OF_128 = 1u << 30 | 8 * 128 >> 4, ROWS_OF_32 = 3u << 30 | 8 * 32 >> 4;
__device__ u32 matrix(u32 address) { return (address & 0x3FFFF) >> 4 | 1u << 16; }
__device__ u64 descriptor(u32 matrix, u32 layout) { return (u64)layout << 32 | matrix; }

#define LIST48 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
    "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47}"
#define LIST64 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
    "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
    "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define EIGHT(c, d, i) \
    c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define ALL32(c, d) EIGHT(c, d, 0), EIGHT(c, d, 8), EIGHT(c, d, 16), EIGHT(c, d, 24)
#define ALL48(c, d) ALL32(c, d), EIGHT(c, d, 32), EIGHT(c, d, 40)
#define ALL64(c, d) ALL48(c, d), EIGHT(c, d, 48), EIGHT(c, d, 56)

// Keeps the compiler from using registers before the products that write them have ended.
__device__ void settled_scores(float (&d)[SCORES]) { asm volatile("" : ALL48("+f", d) :: "memory"); }
__device__ void settled_scores(int (&d)[SCORES]) { asm volatile("" : ALL48("+r", d) :: "memory"); }
__device__ void settled(float (&d)[64]) { asm volatile("" : ALL64("+f", d) :: "memory"); }

__device__ void multiply_scores(int (&d)[SCORES], u64 a, u64 b, int sum) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 " LIST48 ", %48, %49, p;\n}"
                 : ALL48("+r", d) : "l"(a), "l"(b), "r"(sum));
}
__device__ void multiply_scores_bf16(float (&d)[SCORES], u64 a, u64 b, int sum) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 " LIST48 ", %48, %49, p, 1, 1, 0, 0;\n}"
                 : ALL48("+f", d) : "l"(a), "l"(b), "r"(sum));
}
__device__ void multiply_values(float (&d)[64], const u32 (&a)[4], u64 b) {
#if PV == 0
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " LIST64
                 ", {%64,%65,%66,%67}, %68, p, 1, 1;\n}"
                 : ALL64("+f", d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
#else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " LIST64
                 ", {%64,%65,%66,%67}, %68, p, 1, 1, 0;\n}"
                 : ALL64("+f", d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
#endif
}

__device__ void store_word(u32 to, float x) { asm volatile("st.shared.f32 [%0], %1;" :: "r"(to), "f"(x) : "memory"); }

__device__ void scores(Score (&s)[SCORES], u32 q, u32 k) {
#pragma unroll
    for (int step = 0; step < 4 * PARTS; ++step) {
        const u64 b = descriptor(k + (step / 4 * K_PART + step % 4 * 32) / 16, ROWS_OF_128);
        const u64 a = descriptor(q + (step / 4 * Q_PART + step % 4 * 32) / 16, ROWS_OF_128);
#if QK == 0
        multiply_scores(s, a, b, step > 0);
#else
        multiply_scores_bf16(s, a, b, step > 0);
#endif
    }
}

__device__ void values(float (&o)[64], const u32 (&a)[STEP_SLICES][4], u32 v) {
#pragma unroll
    for (int g = 0; g < STEP_SLICES; ++g)
        multiply_values(o, a[g], descriptor(v + g * SLICE_BYTES / 16, ROWS_OF_32));
}

// Nothing else is in flight.
__device__ void first_scores(Score (&s)[SCORES], u32 q, u32 k) {
    wgmma_fence();
    scores(s, q, k);
    wgmma_commit();
    wgmma_wait<0>();
    settled_scores(s);
}
