// Self-attention for Hopper with three consumers: int8 scores, E4M3 weights and values, without lists. hopper.cu says how the
// rest works.
//
// A block takes 192 queries of one head. Each of three warpgroups computes 64 queries against every tile: while it waits for
// its products, the other two compute weights.

extern "C" __global__ void __launch_bounds__(512, 1)
attend(const u8* q, const u8* k, const u8* v, const float* query_scale, const float* key_scale,
       const float* value_scale, const float* value_mean, const int*, const int*, const float* shift,
       bf16* out, float* lse, int tokens) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int heads = gridDim.y, head = blockIdx.y, tiles = (tokens + KEYS - 1) / KEYS;
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    const u32 q_at = base, k_at = q_at + Q_BYTES, v_at = k_at + STAGES * K_BYTES;
    const u32 kept_at = v_at + STAGES * V_BYTES, barriers = kept_at + CONSUMERS * KEPT_BYTES;
    const u32 q_full = barriers, k_full = barriers + 8, k_free = k_full + STAGES * 8, v_full = k_free + STAGES * 8,
              v_free = v_full + STAGES * 8;
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(k_full + i * 8, 1), barrier_init(v_full + i * 8, 1);
            barrier_init(k_free + i * 8, 4 * CONSUMERS), barrier_init(v_free + i * 8, 4 * CONSUMERS);
        }
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
                barrier_wait(k_free + stage * 8, phase);
                barrier_expect(k_full + stage * 8, K_BYTES);
                copy_bulk(k_at + stage * K_BYTES, k + tile * K_BYTES, K_BYTES, k_full + stage * 8);
                barrier_wait(v_free + stage * 8, phase);
                barrier_expect(v_full + stage * 8, V_BYTES);
                copy_bulk(v_at + stage * V_BYTES, v + tile * V_BYTES, V_BYTES, v_full + stage * 8);
            }
        }
    } else {
        more_registers<160>();
        const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // the compiler sees one number a warp
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 all_k = matrix(k_at), all_v = matrix(v_at);
        const int first = blockIdx.x * QUERIES + group * 64 + warp * 16 + lane / 4;
        Rows r;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            r.scale[half] = query_scale[row * QUERIES + first - blockIdx.x * QUERIES + half * 8];
            r.sum[half] = 0;
        }
        float o[64], shrink[2] = {1, 1};
#pragma unroll
        for (int i = 0; i < 64; ++i) o[i] = 0;
        const u32 my_kept = kept_at + group * KEPT_BYTES + threadIdx.x % 128 * 16;
        const float nought = __int_as_float(tokens >> 31);
        auto keep = [&]() {  // and shrinks them
#pragma unroll
            for (int n = 0; n < 64; n += 4) {
                float x[4];
                load_shared(x, my_kept + n * 512);
                for (int e = 0; e < 4; ++e) x[e] = (x[e] + o[n + e]) * shrink[e / 2], o[n + e] = nought;
                store_shared(my_kept + n * 512, x);
            }
        };
        {
            const float none[4] = {};
#pragma unroll
            for (int n = 0; n < 64; n += 4) store_shared(my_kept + n * 512, none);
        }
        int stage = 0, phase = 0;
        const float* scale = key_scale + (i64)head * tiles;
        float factor[2] = {r.scale[0] * scale[0], r.scale[1] * scale[0]}, next_scale = *++scale;  // may be the next head's
        Queries my_q;
        barrier_wait(q_full, 0);
        hold(my_q, q_at + group * 64 * ROW);
        barrier_wait(k_full, 0);
        wgmma_fence();
        Score s[SCORES];
        u32 a[STEP_SLICES][4];
        float sums[2][2];
        scores(s, my_q, all_k);
        wgmma_commit();
        wgmma_wait<0>();
        settled_scores(s);
        if (lane == 0) barrier_arrive(k_free);
        if (tokens < KEYS) hide(s, tokens);
        largest(s, factor, r.most);
        weigh<false>(s, factor, r, a, sums);
        auto add = [&]() {
#pragma unroll
            for (int half = 0; half < 2; ++half) r.sum[half] += sums[half][0] + sums[half][1];
        };
        add();
        auto multiply = [&]() {  // the weights before with their values, and the next scores
            const int before = stage, phase_before = phase;
            if (++stage == STAGES) stage = 0, phase ^= 1;
            factor[0] = r.scale[0] * next_scale, factor[1] = r.scale[1] * next_scale;
            next_scale = *++scale;
            barrier_wait(k_full + stage * 8, phase);
            barrier_wait(v_full + before * 8, phase_before);
            wgmma_fence();
            scores(s, my_q, all_k + stage * (K_BYTES / 16));
            wgmma_commit();
            values(o, a, all_v + before * (V_BYTES / 16));
            wgmma_commit();
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(k_free + stage * 8), barrier_arrive(v_free + before * 8);
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
                weigh<false>(s, factor, r, a, sums);
                grown = too_large(sums);
                if (!grown) add();
            }
            if (!grown && i == tiles - 1) {
                multiply();
                hide(s, tokens - i * KEYS);
                weigh<false>(s, factor, r, a, sums);
                grown = too_large(sums);
                if (!grown) add();
                ++i;
            }
            if (grown) {
                weigh_again(s, factor, r, a, sums, shrink);
                add();
            }
            if (i >= stop) stop += FLUSH;
            keep();
        }
        barrier_wait(v_full + stage * 8, phase);
        wgmma_fence();
        values(o, a, all_v + stage * (V_BYTES / 16));
        wgmma_commit();
        wgmma_wait<0>();
        settled(o);
#pragma unroll
        for (int n = 0; n < 64; n += 4) {
            float x[4];
            load_shared(x, my_kept + n * 512);
            for (int e = 0; e < 4; ++e) o[n + e] += x[e];
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
