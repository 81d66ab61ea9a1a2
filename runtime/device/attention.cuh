// Attention on tensor cores, a warp at a time, and the copies that feed it. Stands in front of the sources that attend
// (kernels.py).
//
// A warp has 16 queries. All warps of a block share tiles of keys and values in shared memory. The softmax is carried
// from tile to tile in float32. Products take bf16 or fp16 and sum in float32 (mma.m16n8k16; PTX ISA 9.7.14 describes
// the fragments).

constexpr float LOG2_E = 1.4426950408889634f;

// Address of a chunk of 16 bytes in rows of WIDTH numbers of 16 bits. Chunks are swapped within a row, so that eight
// rows of a column lie in different banks.
template <int WIDTH>
__device__ u32 chunk_offset(int row, int chunk) { return row * (WIDTH * 2) + ((chunk ^ (row & 7)) << 4); }

// Starts the copy of ROWS rows, beginning with `first`. Rows from `end` on become zeros.
template <int ROWS, int WIDTH, int THREADS, class Half>
__device__ void copy_rows(u32 to, const Half* from, int first, int end) {
    constexpr int CHUNKS = WIDTH / 8;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool there = first + row < end;
        const Half* source = from + (i64)(there ? first + row : 0) * WIDTH + chunk * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to + chunk_offset<WIDTH>(row, chunk)), "l"(source), "r"(there ? 16 : 0) : "memory");
    }
}

__device__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int IN_FLIGHT>
__device__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(IN_FLIGHT) : "memory"); }

__device__ float power_of_2(float x) {  // one instruction, and 0 for -infinity
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#define HALF(Name, name, ptx) \
    struct Name { \
        static __device__ u32 pack(float first, float second) { return pack_##name(first, second); } \
        static __device__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) { \
            asm("mma.sync.aligned.m16n8k16.row.col.f32." ptx "." ptx ".f32 " \
                "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); \
        } \
    };
HALF(Bf16, bf16, "bf16")
HALF(Fp16, fp16, "f16")

__device__ void load_matrices(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address));
}

__device__ void load_matrices_transposed(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address));
}

template <int VALUE>
struct Running {  // A thread has two rows, each shared by four threads.
    float out[VALUE / 8][4];
    float most[2], sum[2];

    __device__ void clear(float least) {
#pragma unroll
        for (int n = 0; n < VALUE / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] = 0;
        most[0] = most[1] = least;
        sum[0] = sum[1] = 0;
    }

    __device__ float row_sum(int half) const {  // over the four threads
        float whole = sum[half];
        whole += __shfl_xor_sync(~0u, whole, 1);
        return whole + __shfl_xor_sync(~0u, whole, 2);
    }
};

// Adds N keys of KEY channels and their values of VALUE channels to `r`. Only the first `valid` keys count.
template <class Half, int N, int KEY, int VALUE>
__device__ void attend_tile(const u32 (&q)[KEY / 16][4], u32 keys, u32 values, int valid, Running<VALUE>& r) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    float s[N / 8][4] = {};
#pragma unroll
    for (int d = 0; d < KEY / 16; ++d)
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            u32 b[4];
            load_matrices(b, keys + chunk_offset<KEY>(n * 16 + matrix / 2 * 8 + row, d * 2 + matrix % 2));
            Half::multiply(s[2 * n], q[d], b[0], b[1]);
            Half::multiply(s[2 * n + 1], q[d], b[2], b[3]);
        }
    if (valid < N) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (n * 8 + lane % 4 * 2 + i % 2 >= valid) s[n][i] = -infinity();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most = r.most[half];
#pragma unroll
        for (int n = 0; n < N / 8; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float shrink = power_of_2((r.most[half] - most) * LOG2_E);
        r.most[half] = most;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                s[n][i] = power_of_2(s[n][i] * LOG2_E - most * LOG2_E);
                sum += s[n][i];
            }
        r.sum[half] = r.sum[half] * shrink + sum;
#pragma unroll
        for (int n = 0; n < VALUE / 8; ++n) r.out[n][2 * half] *= shrink, r.out[n][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
        const u32 p[4] = {Half::pack(s[2 * n][0], s[2 * n][1]), Half::pack(s[2 * n][2], s[2 * n][3]),
                          Half::pack(s[2 * n + 1][0], s[2 * n + 1][1]),
                          Half::pack(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
        for (int d = 0; d < VALUE / 16; ++d) {
            u32 b[4];
            const int key = n * 16 + matrix % 2 * 8 + row;
            load_matrices_transposed(b, values + chunk_offset<VALUE>(key, d * 2 + matrix / 2));
            Half::multiply(r.out[2 * d], p, b[0], b[1]);
            Half::multiply(r.out[2 * d + 1], p, b[2], b[3]);
        }
    }
}
