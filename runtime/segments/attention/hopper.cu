// Self-attention for Hopper with bf16 values: wgmma, bulk copies, a producer and two consumers. hopper_products.cu,
// hopper_weights.cu and hopper_results.cu stand in front.
//
// A block takes 128 queries of one head. One thread copies tiles of keys and values into a ring; each of two warpgroups
// computes 64 queries against every tile, half a tile at a time. While the weights of a half are computed, the scores of the
// half after it and the products of the half before it with the values are multiplied. The tiles lie in global memory as they
// lie in shared memory (tiles.cu), so that a tile is one copy.

// q [heads, tiles of QUERIES, parts, QUERIES, 128 bytes]; k [heads, tiles of KEYS, parts, KEYS, 128 bytes]; v [heads,
// tiles, slices, 128 channels, 32 bytes]. query_scale [heads, tiles * QUERIES] with log2(e), key_scale [heads, tiles],
// value_scale and value_mean [heads, 128]. out bf16 [tokens, heads * 128], or see `place_of`. shift and lse float32
// [heads, tokens]; a null lse is not written. Grid (tiles of queries, heads).
extern "C" __global__ void __launch_bounds__(384, 1)
attend(const u8* q, const u8* k, const u8* v, const float* query_scale, const float* key_scale,
       const float* value_scale, const float* value_mean, const float* shift,
       bf16* out, float* lse, int tokens, const i64* places) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int head = blockIdx.y, tiles = (tokens + KEYS - 1) / KEYS;
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    const u32 q_at = base, k_at = q_at + Q_BYTES, v_at = k_at + STAGES * K_BYTES;
    const u32 barriers = v_at + STAGES * V_BYTES;
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
    if (threadIdx.x < 128) {
        fewer_registers<24>();
        if (threadIdx.x == 0) {
            barrier_expect(q_full, Q_BYTES);
            copy_bulk(q_at, q + row * Q_BYTES, Q_BYTES, q_full);
            for (int i = 0; i < tiles; ++i) {
                const i64 tile = (i64)head * tiles + i;
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
        float o[64], shrink[2] = {1, 1};
        begin(r, o, query_scale + row * QUERIES + first - blockIdx.x * QUERIES);
        auto valid = [&](int tile) { return tokens - tile * KEYS; };
        auto shrunk = [&]() {
#pragma unroll
            for (int n = 0; n < 64; ++n) o[n] *= shrink[n / 2 % 2];
        };
        int stage = 0, phase = 0;
        float key = scales[0], next_key = tiles > 1 ? scales[1] : 0.0f;
        const u32 my_q = matrix(q_at + group * 64 * ROW);
        barrier_wait(q_full, 0);
        barrier_wait(k_full, 0);
        Score s0[SCORES], s1[SCORES];  // of both halves of a tile
        u32 a0[STEP_SLICES][4], a1[STEP_SLICES][4];
        constexpr int K_HALF = STEP * ROW / 16, V_HALF = STEP_SLICES * SLICE_BYTES / 16;
        first_scores(s0, my_q, all_k);
        wgmma_fence();
        scores(s1, my_q, all_k + K_HALF);
        wgmma_commit();
        soften<true>(s0, a0, r, key, tokens, shrink);
        wgmma_wait<0>();
        settled_scores(s1);
        if (lane == 0) barrier_arrive(k_free);
        // Nothing is in flight at the loop's end: ptxas would else have all products wait for each other.
        for (int i = 1; i < tiles; ++i) {
            const int before = stage, phase_before = phase;
            const float key_before = key;
            if (++stage == STAGES) stage = 0, phase ^= 1;
            key = next_key;
            if (i + 1 < tiles) next_key = scales[i + 1];
            const u32 k_now = all_k + stage * (K_BYTES / 16), v_now = all_v + before * (V_BYTES / 16);
            barrier_wait(k_full + stage * 8, phase);
            barrier_wait(v_full + before * 8, phase_before);
            wgmma_fence();
            scores(s0, my_q, k_now);
            wgmma_commit();
            values(o, a0, v_now);
            wgmma_commit();
            bool grown = soften<false>(s1, a1, r, key_before, valid(i - 1) - STEP, shrink);
            needed(r.sum[0] + r.sum[1], q_full);
            wgmma_wait<0>();
            settled_scores(s0);
            settled(o);
            if (grown) shrunk();
            wgmma_fence();
            scores(s1, my_q, k_now + K_HALF);
            wgmma_commit();
            values(o, a1, v_now + V_HALF);
            wgmma_commit();
            grown = soften<false>(s0, a0, r, key, valid(i), shrink);
            needed(r.sum[0] + r.sum[1], q_full);
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(k_free + stage * 8), barrier_arrive(v_free + before * 8);
            settled_scores(s1);
            settled(o);
            if (grown) shrunk();
        }
        const u32 last_v = all_v + stage * (V_BYTES / 16);
        barrier_wait(v_full + stage * 8, phase);
        wgmma_fence();
        values(o, a0, last_v);
        wgmma_commit();
        const bool grown = soften<false>(s1, a1, r, key, valid(tiles - 1) - STEP, shrink);
        wgmma_wait<0>();
        settled(o);
        if (grown) shrunk();
        wgmma_fence();
        values(o, a1, last_v + V_HALF);
        wgmma_commit();
        wgmma_wait<0>();
        settled(o);
        const auto place = [&](int token) { return place_of(out, places, token); };
        write_rows(o, r, value_mean, value_scale, shift, lse, first, tokens, place);
    }
}
