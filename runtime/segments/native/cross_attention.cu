// Cross-attention to text and image: the sum of two softmaxes over the same queries.
//
// A block of threads takes 128 queries of one head, a warp 16 of them (runtime/device/attention.cuh). Two tiles of 64
// keys are in flight. Queries are [tokens, heads * 128] and already scaled; keys and values are [heads, keys, 128].

constexpr int WARPS = 8;
constexpr int QUERIES = WARPS * 16;
constexpr int TILE = 64;         // keys
constexpr int SMALL_TILE = 16;   // for the remaining keys

// One softmax over all `keys`. r.out is the result, already divided by the sum of the weights.
__device__ void attend(const u32 (&q)[HEAD_DIM / 16][4], const bf16* k, const bf16* v, int keys, u32 buffers,
                       Running<HEAD_DIM>& r) {
    constexpr u32 MATRIX = TILE * 256, STAGE = 2 * MATRIX;
    r.clear(-infinity());
    const int tiles = keys / TILE;
    auto copy = [&](u32 to, const bf16* from, int first) {
        copy_rows<TILE, HEAD_DIM, WARPS * 32>(to, from, first, keys);
    };
    __syncthreads();  // the buffers are free
    if (tiles) {
        copy(buffers, k, 0);
        copy(buffers + MATRIX, v, 0);
    }
    end_of_copies();
    for (int tile = 0; tile < tiles; ++tile) {
        const u32 here = buffers + tile % 2 * STAGE, next = buffers + (tile + 1) % 2 * STAGE;
        if (tile + 1 < tiles) {
            copy(next, k, (tile + 1) * TILE);
            copy(next + MATRIX, v, (tile + 1) * TILE);
        }
        end_of_copies();
        wait_for_copies<1>();
        __syncthreads();
        attend_tile<Bf16, TILE, HEAD_DIM>(q, here, here + MATRIX, TILE, r);
        __syncthreads();
    }
    const int left = keys - tiles * TILE;
    if (left) {  // all remaining keys are copied at once and attended to in small tiles
        copy(buffers, k, tiles * TILE);
        copy(buffers + MATRIX, v, tiles * TILE);
        end_of_copies();
        wait_for_copies<0>();
        __syncthreads();
        for (int first = 0; first < left; first += SMALL_TILE) {
            const u32 here = buffers + first * 256;
            attend_tile<Bf16, SMALL_TILE, HEAD_DIM>(q, here, here + MATRIX, left - first, r);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float inverse = 1.0f / r.row_sum(half);
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
    Running<HEAD_DIM> r;
    attend(q, text_k + head * text_keys * HEAD_DIM, text_v + head * text_keys * HEAD_DIM, text_keys,
           shared_address(buffers), r);
    u32 text[HEAD_DIM / 8][2];  // kept as bf16: there are too few registers for float32
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
