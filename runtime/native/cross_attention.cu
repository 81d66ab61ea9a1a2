// Cross-attention to text and image: two softmaxes over the same queries, whose results are added.
//
// A block of threads takes 128 queries of one head, a warp 16 of them; keys and values come in tiles of 64
// through shared memory, two tiles in flight, the softmax is carried along from tile to tile in float32.
// Products are bf16 with float32 sums (mma.m16n8k16; fragments as in PTX ISA 9.7.14). Q [tokens, heads * 128],
// multiplied by the softmax scale; keys and values [heads, keys, 128].

constexpr int WARPS = 8;
constexpr int QUERIES = WARPS * 16;
constexpr int TILE = 64;         // keys
constexpr int SMALL_TILE = 16;   // for the keys left over
constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes in a row

struct Running {  // of a thread: two rows, each shared by four threads
    float out[HEAD_DIM / 8][4];
    float most[2], sum[2];
};

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Rows of 256 bytes; the chunks of a row are swapped so that eight rows of a column lie in different banks.
__device__ u32 chunk_offset(int row, int chunk) { return row * 256 + ((chunk ^ (row & 7)) << 4); }

__device__ float power_of_2(float x) {  // one instruction, and 0 for -infinity
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
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

// Starts the copy of ROWS rows from `first` on; rows past the last key become zeros.
template <int ROWS>
__device__ void copy_rows(u32 to, const bf16* from, int first, int keys) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += WARPS * 32) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool there = first + row < keys;
        const bf16* source = from + (i64)(there ? first + row : 0) * HEAD_DIM + chunk * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to + chunk_offset(row, chunk)), "l"(source), "r"(there ? 16 : 0) : "memory");
    }
}

__device__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int IN_FLIGHT>
__device__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(IN_FLIGHT) : "memory"); }

// N keys of which the first `valid` count.
template <int N>
__device__ void attend_tile(const u32 (&q)[HEAD_DIM / 16][4], u32 keys, u32 values, int valid, Running& r) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    float s[N / 8][4] = {};
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d)
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            u32 b[4];
            load_matrices(b, keys + chunk_offset(n * 16 + matrix / 2 * 8 + row, d * 2 + matrix % 2));
            multiply(s[2 * n], q[d], b[0], b[1]);
            multiply(s[2 * n + 1], q[d], b[2], b[3]);
        }
    if (valid < N) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (n * 8 + lane % 4 * 2 + i % 2 >= valid) s[n][i] = -__int_as_float(0x7F800000);
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
        for (int n = 0; n < HEAD_DIM / 8; ++n) r.out[n][2 * half] *= shrink, r.out[n][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
        const u32 p[4] = {pack_bf16(s[2 * n][0], s[2 * n][1]), pack_bf16(s[2 * n][2], s[2 * n][3]),
                          pack_bf16(s[2 * n + 1][0], s[2 * n + 1][1]), pack_bf16(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
            u32 b[4];
            load_matrices_transposed(b, values + chunk_offset(n * 16 + matrix % 2 * 8 + row, d * 2 + matrix / 2));
            multiply(r.out[2 * d], p, b[0], b[1]);
            multiply(r.out[2 * d + 1], p, b[2], b[3]);
        }
    }
}

// One softmax over all `keys`; the result is in r.out, divided by its sum.
__device__ void attend(const u32 (&q)[HEAD_DIM / 16][4], const bf16* k, const bf16* v, int keys, u32 buffers, Running& r) {
    constexpr u32 MATRIX = TILE * 256, STAGE = 2 * MATRIX;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) r.out[n][i] = 0;
    r.most[0] = r.most[1] = -__int_as_float(0x7F800000);
    r.sum[0] = r.sum[1] = 0;

    const int tiles = keys / TILE;
    __syncthreads();  // the buffers are free
    if (tiles) {
        copy_rows<TILE>(buffers, k, 0, keys);
        copy_rows<TILE>(buffers + MATRIX, v, 0, keys);
    }
    end_of_copies();
    for (int tile = 0; tile < tiles; ++tile) {
        const u32 here = buffers + tile % 2 * STAGE, next = buffers + (tile + 1) % 2 * STAGE;
        if (tile + 1 < tiles) {
            copy_rows<TILE>(next, k, (tile + 1) * TILE, keys);
            copy_rows<TILE>(next + MATRIX, v, (tile + 1) * TILE, keys);
        }
        end_of_copies();
        wait_for_copies<1>();
        __syncthreads();
        attend_tile<TILE>(q, here, here + MATRIX, TILE, r);
        __syncthreads();
    }
    const int left = keys - tiles * TILE;
    if (left) {  // the whole rest is copied at once and worked on in small tiles
        copy_rows<TILE>(buffers, k, tiles * TILE, keys);
        copy_rows<TILE>(buffers + MATRIX, v, tiles * TILE, keys);
        end_of_copies();
        wait_for_copies<0>();
        __syncthreads();
        for (int first = 0; first < left; first += SMALL_TILE)
            attend_tile<SMALL_TILE>(q, buffers + first * 256, buffers + MATRIX + first * 256, left - first, r);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = r.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float inverse = 1.0f / sum;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) r.out[n][2 * half] *= inverse, r.out[n][2 * half + 1] *= inverse;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
cross_attention(const bf16* queries, const bf16* text_k, const bf16* text_v, int text_keys, const bf16* image_k,
                const bf16* image_v, int image_keys, bf16* out, int tokens) {
    extern __shared__ __align__(1024) unsigned char buffers[];
    const int lane = threadIdx.x % 32, group = lane / 4, column = lane % 4 * 2;
    const int first = blockIdx.x * QUERIES + threadIdx.x / 32 * 16 + group;
    const i64 head = blockIdx.y;
    const i64 rows[2] = {first, first + 8};
    u32 q[HEAD_DIM / 16][4];
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const i64 token = rows[i % 2] < tokens ? rows[i % 2] : tokens - 1;
            q[d][i] = *(const u32*)(queries + token * DIM + head * HEAD_DIM + d * 16 + i / 2 * 8 + column);
        }
    Running r;
    attend(q, text_k + head * text_keys * HEAD_DIM, text_v + head * text_keys * HEAD_DIM, text_keys,
           shared_address(buffers), r);
    u32 text[HEAD_DIM / 8][2];  // waits as bf16: in float32 the registers would not do
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) text[n][half] = pack_bf16(r.out[n][2 * half], r.out[n][2 * half + 1]);
    attend(q, image_k + head * image_keys * HEAD_DIM, image_v + head * image_keys * HEAD_DIM, image_keys,
           shared_address(buffers), r);
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (rows[half] < tokens)
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n)
                *(u32*)(out + rows[half] * DIM + head * HEAD_DIM + n * 8 + column) = pack_bf16(
                    r.out[n][2 * half] + low(text[n][half]), r.out[n][2 * half + 1] + high(text[n][half]));
}
