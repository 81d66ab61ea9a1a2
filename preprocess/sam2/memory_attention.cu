// Attention of one head to memories, with the keys shared out among blocks of threads and what they found joined:
// the queries alone would leave most multiprocessors without work.
//
// A block takes QUERIES queries, a warp 16 of them, over its share of the keys; tiles of TILE keys come through
// shared memory, two in flight, and the softmax is carried along in float32. Products are fp16 with float32 sums
// (mma.m16n8k16; fragments as in PTX ISA 9.7.14).

typedef unsigned int u32;
typedef unsigned short fp16;
typedef long long i64;

constexpr int TILE = 64;  // keys
constexpr int QUERIES = WARPS * 16;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr u32 KEYS_BYTES = TILE * CHANNELS * 2, STAGE_BYTES = KEYS_BYTES + TILE * VALUES * 2;

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Rows of `WIDTH` halves; the chunks of a row are swapped so that eight rows of a column lie in different banks.
template <int WIDTH>
__device__ u32 chunk_offset(int row, int chunk) { return row * WIDTH * 2 + ((chunk ^ (row & 7)) << 4); }

__device__ float power_of_2(float x) {  // one instruction, and 0 for -infinity
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ void load_matrices(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address));
}

__device__ void load_matrices_transposed(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address));
}

// Starts the copy of TILE rows of WIDTH halves, of which the first `valid` are there; the others become zeros.
template <int WIDTH>
__device__ void copy_rows(u32 to, const fp16* from, int valid) {
    constexpr int CHUNKS = WIDTH / 8;
#pragma unroll
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += WARPS * 32) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const fp16* source = from + (i64)(row < valid ? row : 0) * WIDTH + chunk * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to + chunk_offset<WIDTH>(row, chunk)), "l"(source), "r"(row < valid ? 16 : 0) : "memory");
    }
}

struct Running {  // of a thread: two rows, each shared by four threads
    float out[VALUES / 8][4];
    float most[2], sum[2];
};

// A tile of keys of which the first `valid` count.
__device__ void attend_tile(const u32 (&q)[CHANNELS / 16][4], u32 keys, u32 values, int valid, Running& r) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    float s[TILE / 8][4] = {};
#pragma unroll
    for (int d = 0; d < CHANNELS / 16; ++d)
#pragma unroll
        for (int n = 0; n < TILE / 16; ++n) {
            u32 b[4];
            load_matrices(b, keys + chunk_offset<CHANNELS>(n * 16 + matrix / 2 * 8 + row, d * 2 + matrix % 2));
            multiply(s[2 * n], q[d], b[0], b[1]);
            multiply(s[2 * n + 1], q[d], b[2], b[3]);
        }
    if (valid < TILE) {
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (n * 8 + lane % 4 * 2 + i % 2 >= valid) s[n][i] = -__int_as_float(0x7F800000);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most = r.most[half];
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float shrink = power_of_2((r.most[half] - most) * LOG2_E);
        r.most[half] = most;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                s[n][i] = power_of_2(s[n][i] * LOG2_E - most * LOG2_E);
                sum += s[n][i];
            }
        r.sum[half] = r.sum[half] * shrink + sum;
#pragma unroll
        for (int n = 0; n < VALUES / 8; ++n) r.out[n][2 * half] *= shrink, r.out[n][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < TILE / 16; ++n) {
        const u32 p[4] = {pack(s[2 * n][0], s[2 * n][1]), pack(s[2 * n][2], s[2 * n][3]),
                          pack(s[2 * n + 1][0], s[2 * n + 1][1]), pack(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
        for (int d = 0; d < VALUES / 16; ++d) {
            u32 b[4];
            const int key = n * 16 + matrix % 2 * 8 + row;
            load_matrices_transposed(b, values + chunk_offset<VALUES>(key, d * 2 + matrix / 2));
            multiply(r.out[2 * d], p, b[0], b[1]);
            multiply(r.out[2 * d + 1], p, b[2], b[3]);
        }
    }
}

// Keys count in two runs: the first seen[0], and seen[1] from `back_start` on. Block x takes queries, y a share of the
// keys. Sums of weighted values, divided by the sum of the weights, go to `partial` [shares, queries, VALUES], and
// the logarithm of that sum, of base 2, to `logs` [shares, queries].
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
    Running r;
#pragma unroll
    for (int n = 0; n < VALUES / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) r.out[n][i] = 0;
    r.most[0] = r.most[1] = -1e30f;
    r.sum[0] = r.sum[1] = 0;

    const int front = (int)seen[0], back = (int)seen[1];
    const int front_tiles = (front + TILE - 1) / TILE, tiles = front_tiles + (back + TILE - 1) / TILE;
    const int begin = tiles * blockIdx.y / gridDim.y, end = tiles * (blockIdx.y + 1) / gridDim.y;
    const u32 base = shared_address(buffers);

    auto at = [&](int tile, int& row) {  // where a tile begins, and how many keys are left there
        const int offset = (tile < front_tiles ? tile : tile - front_tiles) * TILE;
        row = tile < front_tiles ? offset : back_start + offset;
        return (tile < front_tiles ? front : back) - offset;
    };
    auto copy = [&](int tile, u32 to) {
        int row;
        const int valid = at(tile, row);
        copy_rows<CHANNELS>(to, keys + (i64)row * CHANNELS, valid);
        copy_rows<VALUES>(to + KEYS_BYTES, values + (i64)row * VALUES, valid);
    };
    if (begin < end) copy(begin, base);
    asm volatile("cp.async.commit_group;" ::: "memory");
    for (int tile = begin; tile < end; ++tile) {
        const u32 here = base + (tile - begin) % 2 * STAGE_BYTES, next = base + (tile - begin + 1) % 2 * STAGE_BYTES;
        if (tile + 1 < end) copy(tile + 1, next);
        asm volatile("cp.async.commit_group;" ::: "memory");
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
        int row;
        attend_tile(q, here, here + KEYS_BYTES, at(tile, row), r);
        __syncthreads();
    }
    const i64 share = (i64)blockIdx.y * tokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = r.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (rows[half] >= tokens) continue;
        const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
        float* out = partial + (share + rows[half]) * VALUES + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < VALUES / 8; ++n)
            *(float2*)(out + n * 8) = make_float2(r.out[n][2 * half] * inverse, r.out[n][2 * half + 1] * inverse);
        if (lane % 4 == 0) logs[share + rows[half]] = r.most[half] * LOG2_E + log2f(sum);
    }
}

// The shares' results by their weights, to fp16 [queries, VALUES]; a thread has two values.
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
    out[pair] = pack(low / sum, high / sum);
}
