// Self-attention on Hopper: the first sums, sums that are kept in shared memory, and the results.

__device__ void load_shared(float (&x)[4], u32 from) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(from) : "memory");
}
__device__ void store_shared(u32 to, const float (&x)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

// Two rows before their first scores. `scales` has the scale of the first, and eight places on that of the other.
__device__ void begin(Rows& r, float (&o)[64], const float* scales) {
#pragma unroll
    for (int half = 0; half < 2; ++half) r.scale[half] = scales[half * 8], r.sum[half] = 0;
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] = 0;
}

// The float32 sums of a warpgroup: where a thread's begin.
__device__ u32 kept_sums(u32 kept, int group) { return kept + group * KEPT_BYTES + threadIdx.x % 128 * 16; }

__device__ void clear_kept(u32 kept) {
    const float none[4] = {};
#pragma unroll
    for (int n = 0; n < 64; n += 4) store_shared(kept + n * 512, none);
}

// Moves sums from the registers to the kept ones, and shrinks these. `nought` is zero, which ptxas must not see. It would give
// the next product a predicate, "add nothing", that depends on which way a warp came here. The four warps of a product would
// differ in it, and results were wrong (docs/log.md).
__device__ void keep(u32 kept, float (&o)[64], const float (&shrink)[2], float nought) {
#pragma unroll
    for (int n = 0; n < 64; n += 4) {
        float x[4];
        load_shared(x, kept + n * 512);
        for (int e = 0; e < 4; ++e) x[e] = (x[e] + o[n + e]) * shrink[e / 2], o[n + e] = nought;
        store_shared(kept + n * 512, x);
    }
}

__device__ void add_kept(u32 kept, float (&o)[64]) {
#pragma unroll
    for (int n = 0; n < 64; n += 4) {
        float x[4];
        load_shared(x, kept + n * 512);
        for (int e = 0; e < 4; ++e) o[n + e] += x[e];
    }
}

// The last weights with their values, and the kept sums.
__device__ void last_values(float (&o)[64], const u32 (&a)[STEP_SLICES][4], u32 v, u32 kept) {
    wgmma_fence();
    values(o, a, v);
    wgmma_commit();
    wgmma_wait<0>();
    settled(o);
    add_kept(kept, o);
}

// Where the channels of a token go, in `out` [tokens, heads * 128]. When ranks share the tokens: into the own rows, or to `out`
// [other ranks, rows of a rank, heads * 128], from where they are copied. `places` is told in contracts/attention.py.
__device__ bf16* place_of(bf16* out, const i64* places, int token) {
    const int head = blockIdx.y;
    if (!places) return out + ((i64)token * gridDim.y + head) * DIM;
    const int slot = token / (int)places[0], inside = token % (int)places[0], share = places[1], rank = inside / share;
    const int own = places[2], row = slot * share + inside - rank * share;
    if (rank == own) return (bf16*)places[6] + (row * places[4] + places[5] + head) * DIM;
    return out + (((rank - (rank > own)) * places[3] + row) * gridDim.y + head) * DIM;
}

// Writes two rows, token `first` and the eighth after it, to the addresses of `place`. `means` and `factors` are those of v.
template <class Place>
__device__ void write_rows(const float (&o)[64], const Rows& r, const float* means, const float* factors, const float* shift,
                           float* lse, int first, int tokens, Place place) {
    const int head = blockIdx.y, lane = threadIdx.x % 32;
    means += head * DIM + lane % 4 * 2, factors += head * DIM + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = r.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int token = first + half * 8;
        const float inverse = 1.0f / sum;
        if (token < tokens) {
            bf16* to = place(token) + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                const float2 factor = *(const float2*)(factors + n * 8), mean = *(const float2*)(means + n * 8);
                *(u32*)(to + n * 8) = pack_bf16(o[n * 4 + half * 2] * inverse * factor.x + mean.x,
                                                o[n * 4 + half * 2 + 1] * inverse * factor.y + mean.y);
            }
            if (lse && lane % 4 == 0) {
                const i64 at = (i64)head * tokens + token;
                lse[at] = (__log2f(sum) - r.base[half]) / LOG2_E + shift[at];
            }
        }
    }
}
