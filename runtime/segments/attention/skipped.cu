// Adds the skipped blocks of keys to block-sparse attention: each counts as BLOCK keys that are equal to its mean key,
// and have its mean value. Behind attention.cuh. HEAD_DIM is 128.

constexpr int WARPS = 4;  // of 16 queries: so a multiprocessor has registers for four blocks of threads
constexpr int PARTS = QUERIES / (WARPS * 16);  // of a block of queries, a block of threads each
constexpr int TILE = 32;  // means; with 64, a multiprocessor has registers for half as many blocks of threads (docs/log.md)
static_assert(WARPS * 16 * PARTS == QUERIES && HEAD_DIM == 128);

// Starts the copy of TILE rows of `means`, whose numbers are in `list` from `first` on. Rows from `end` on are zeros.
__device__ void copy_listed(u32 to, const bf16* means, const int* list, int first, int end) {
#pragma unroll
    for (int i = threadIdx.x; i < TILE * HEAD_DIM / 8; i += WARPS * 32) {
        const int row = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8);
        const bool there = first + row < end;
        const bf16* source = means + (i64)(there ? list[first + row] : 0) * HEAD_DIM + chunk * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to + chunk_offset<HEAD_DIM>(row, chunk)), "l"(source), "r"(there ? 16 : 0) : "memory");
    }
}

// `means` is [2, heads, blocks, HEAD_DIM], of keys and values. `list` and `count` are those of select.cu. `lse`, [heads,
// tokens], is the logarithm of the sum of exp(score) over a query's kept keys. All are in the order of the blocks, as
// is `exact` [tokens, heads * HEAD_DIM], the attention to the kept keys; `attended` has that of the video. Grid (PARTS *
// blocks of queries, heads), WARPS * 32 threads.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
add_skipped(const bf16* queries, const bf16* means, const int* list, const int* count, const float* lse,
            const bf16* exact, const int* order, bf16* attended, i64 tokens) {
    extern __shared__ __align__(1024) unsigned char buffers[];
    constexpr u32 MATRIX = TILE * HEAD_DIM * 2, STAGE = 2 * MATRIX;
    const int blocks = (int)((tokens + BLOCK - 1) / BLOCK), heads = gridDim.y;
    const i64 head = blockIdx.y, block_row = head * (gridDim.x / PARTS) + blockIdx.x / PARTS;
    const int kept = count[block_row], tiles = (blocks - kept + TILE - 1) / TILE;
    const int* here = list + block_row * blocks;
    const bf16 *k = means + head * blocks * HEAD_DIM, *v = k + (i64)heads * blocks * HEAD_DIM;

    const int lane = threadIdx.x % 32, column = lane % 4 * 2;
    const i64 first = (i64)blockIdx.x * WARPS * 16 + threadIdx.x / 32 * 16 + lane / 4, rows[2] = {first, first + 8};
    u32 q[HEAD_DIM / 16][4];
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const i64 token = rows[i % 2] < tokens ? rows[i % 2] : tokens - 1;
            q[d][i] = *(const u32*)(queries + (head * tokens + token) * HEAD_DIM + d * 16 + i / 2 * 8 + column);
        }

    Running<HEAD_DIM> r;
    r.clear(-infinity());
    const u32 start = shared_address(buffers);
    auto copy = [&](int tile) {
        const u32 to = start + tile % 2 * STAGE;
        copy_listed(to, k, here, kept + tile * TILE, blocks);
        copy_listed(to + MATRIX, v, here, kept + tile * TILE, blocks);
    };
    copy(0);
    end_of_copies();
    for (int tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles) copy(tile + 1);
        end_of_copies();
        wait_for_copies<1>();
        __syncthreads();
        const u32 at = start + tile % 2 * STAGE;
        attend_tile<Bf16, TILE, HEAD_DIM>(q, at, at + MATRIX, blocks - kept - tile * TILE, r);
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = r.row_sum(half);  // all threads of a warp take part
        if (rows[half] >= tokens) continue;
        const float kept_lse = lse[head * tokens + rows[half]], means_most = r.most[half] + LOG_BLOCK;
        const float most = fmaxf(kept_lse, means_most);
        const float a = power_of_2((kept_lse - most) * LOG2_E), b = power_of_2((means_most - most) * LOG2_E);
        const float inverse = 1.0f / (a + b * sum);
        const bf16* from = exact + (rows[half] * heads + head) * HEAD_DIM + column;
        bf16* to = attended + ((i64)order[rows[half]] * heads + head) * HEAD_DIM + column;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
            const u32 pair = *(const u32*)(from + n * 8);
            *(u32*)(to + n * 8) =
                pack_bf16((widen(bf16{(u16)pair}) * a + r.out[n][2 * half] * b) * inverse,
                          (widen(bf16{(u16)(pair >> 16)}) * a + r.out[n][2 * half + 1] * b) * inverse);
        }
    }
}
