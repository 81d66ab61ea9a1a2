// Self-attention for Hopper with three consumers: int8 scores, E4M3 weights and values. The rest is as in hopper.cu.
//
// A block takes 192 queries of one head, and each warpgroup 64 of them against every tile. While one waits for its products, the
// other two compute weights. So each needs the registers of one tile's scores alone, and shares of the tiles' copies are smaller.

constexpr int TILE_BYTES = K_BYTES + V_BYTES;

extern "C" __global__ void __launch_bounds__(512, 1)
attend(const u8* q, const u8* k, const u8* v, const float* query_scale, const float* key_scale,
       const float* value_scale, const float* value_mean, const float* shift,
       bf16* out, float* lse, int tokens, const i64* places) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int head = blockIdx.y, tiles = (tokens + KEYS - 1) / KEYS;
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    const u32 q_at = base, k_at = q_at + Q_BYTES, kept_at = k_at + STAGES * TILE_BYTES;
    const u32 barriers = kept_at + CONSUMERS * KEPT_BYTES;
    const u32 q_full = barriers, full = barriers + 8, free = full + STAGES * 8;
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < STAGES; ++i) barrier_init(full + i * 8, 1), barrier_init(free + i * 8, 4 * CONSUMERS);
        barriers_ready();
    }
    __syncthreads();
    const i64 row = (i64)head * gridDim.x + blockIdx.x;
    if (threadIdx.x < 128) {
        fewer_registers<32>();
        if (threadIdx.x == 0) {
            barrier_expect(q_full, Q_BYTES);
            copy_bulk(q_at, q + row * Q_BYTES, Q_BYTES, q_full);
            for (int i = 0; i < tiles; ++i) {
                const i64 tile = (i64)head * tiles + i;
                const int stage = i % STAGES;
                const u32 phase = i / STAGES % 2 ^ 1;
                barrier_wait(free + stage * 8, phase);
                barrier_expect(full + stage * 8, TILE_BYTES);
                copy_bulk(k_at + stage * TILE_BYTES, k + tile * K_BYTES, K_BYTES, full + stage * 8);
                copy_bulk(k_at + stage * TILE_BYTES + K_BYTES, v + tile * V_BYTES, V_BYTES, full + stage * 8);
            }
        }
    } else {
        more_registers<160>();
        const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // the compiler sees one number a warp
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 all = matrix(k_at);
        const int first = blockIdx.x * QUERIES + group * 64 + warp * 16 + lane / 4;
        Rows r;
        float o[64], shrink[2] = {1, 1};
        begin(r, o, query_scale + row * QUERIES + first - blockIdx.x * QUERIES);
        const u32 kept = kept_sums(kept_at, group);
        const float nought = __int_as_float(tokens >> 31);
        clear_kept(kept);
        int stage = 0, phase = 0;
        const float* scale = key_scale + (i64)head * tiles;
        float factor[1][2] = {{r.scale[0] * scale[0], r.scale[1] * scale[0]}}, next_scale = *++scale;  // may be the next head's
        const u32 my_q = matrix(q_at + group * 64 * ROW);
        barrier_wait(q_full, 0);
        barrier_wait(full, 0);
        Score s[SCORES];
        u32 a[STEP_SLICES][4];
        float sums[2][2];
        first_scores(s, my_q, all);
        if (tokens < KEYS) hide(s, tokens);
        largest(s, factor, r.base);
        weigh<false>(s, factor, r, a, sums);
        add(r, sums);
        auto multiply = [&]() {  // the weights before with their values, and the next scores
            const u32 before = all + stage * (TILE_BYTES / 16), free_before = free + stage * 8;
            if (++stage == STAGES) stage = 0, phase ^= 1;
            factor[0][0] = r.scale[0] * next_scale, factor[0][1] = r.scale[1] * next_scale;
            next_scale = *++scale;
            barrier_wait(full + stage * 8, phase);
            wgmma_fence();
            scores(s, my_q, all + stage * (TILE_BYTES / 16));
            wgmma_commit();
            values(o, a, before + K_BYTES / 16);
            wgmma_commit();
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(free_before);
            settled_scores(s);
            settled(o);
        };
        // Warpgroups add up at different tiles. What is rare stays out of the inner loop.
        int i = 1, stop = FLUSH - group * FLUSH / CONSUMERS;
        while (i < tiles) {
            bool grown = false;
            shrink[0] = shrink[1] = 1;
            const int end = min(stop, tiles - 1);
            for (; i < end && !grown; ++i) {
                multiply();
                grown = weigh_and_add(s, factor, r, a, sums);
            }
            if (!grown && i == tiles - 1) {
                multiply();
                hide(s, tokens - i * KEYS);
                grown = weigh_and_add(s, factor, r, a, sums);
                ++i;
            }
            if (grown) {
                weigh_again(s, factor, r, a, sums, shrink);
                add(r, sums);
            }
            if (i >= stop) stop += FLUSH;
            keep(kept, o, shrink, nought);
        }
        last_values(o, a, all + (stage * TILE_BYTES + K_BYTES) / 16, kept);
        const auto place = [&](int token) { return place_of(out, places, token); };
        write_rows(o, r, value_mean, value_scale, shift, lse, first, tokens, place);
    }
}
