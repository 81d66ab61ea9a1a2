// Block-sparse self-attention for Hopper: as in hopper_three.cu, but a block of 192 queries attends to listed tiles of KEYS keys,
// and to the other tiles' means, each of which counts as KEYS keys.
//
// The means of all tiles are keys in further tiles, the tiles of means. The listed tiles and then the tiles of means go through
// the ring. They are multiplied STEP keys at a time: four steps of 96 keys are three tiles of 128, so a step may have keys of two.
// Every slice of 32 keys has a scale, a word of marks for keys that are hidden, and a lift: its weights are 2^lift times as large.
// The tail are the steps with means or with hidden keys. The steps before it need neither marks nor lifts.

constexpr int STEPS = 4, TILE_SLICES = KEYS / SLICE;  // steps in a turn of the ring, slices in a tile
constexpr int LOG2_KEYS = 7;  // a tile's mean counts as KEYS keys
constexpr int ROW_OF_SLICES = STEPS * 16;  // bytes: four numbers for each step, the last unused
static_assert(STAGES * KEYS == STEPS * STEP && KEYS % SLICE == 0 && KEYS == 1 << LOG2_KEYS);

// Marks of a slice whose first `valid` keys are seen.
__device__ u32 marks_of(int valid) { return valid >= SLICE ? 0 : valid <= 0 ? ~0u : ~0u << valid; }

// Arguments that are not here are those of hopper.cu. Each row of `lists` [heads, blocks of queries, tiles] begins with the numbers
// of its tiles, in ascending order; `counts` [heads, blocks of queries] has their number, at least one. `mean_k`, `mean_v` and
// `mean_scale` are as `k`, `v` and `key_scale`, with a key for each tile's mean. `listed` [heads, blocks of queries, slices of the
// tiles of means] hides the means of listed tiles, and keys behind the last mean. `places` [tokens] has each token's row of `out`.
extern "C" __global__ void __launch_bounds__(512, 1)
attend(const u8* q, const u8* k, const u8* v, const float* query_scale, const float* key_scale,
       const float* value_scale, const float* value_mean, const int* lists, const int* counts, const u8* mean_k, const u8* mean_v,
       const float* mean_scale, const u32* listed, const float* shift, bf16* out, float* lse, int tokens, const int* places) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int head = blockIdx.y, tiles = (tokens + KEYS - 1) / KEYS;
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    const u32 q_at = base, k_at = q_at + Q_BYTES, v_at = k_at + STAGES * K_BYTES, kept_at = v_at + STAGES * V_BYTES;
    const u32 scales_at = kept_at + CONSUMERS * KEPT_BYTES;
    const u32 marks_at = scales_at + ROW_OF_SLICES, lifts_at = marks_at + ROW_OF_SLICES;
    const u32 q_full = lifts_at + ROW_OF_SLICES, full = q_full + 8, free = full + STAGES * 8;  // free[STAGES] is of no tile
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < STAGES; ++i) barrier_init(full + i * 8, 1);
        for (int i = 0; i < STEPS; ++i) barrier_init(free + i * 8, 4 * CONSUMERS);
        barriers_ready();
    }
    __syncthreads();
    const i64 row = (i64)head * gridDim.x + blockIdx.x;
    const int* list = lists + row * tiles;
    const int count = counts[row], missing = list[count - 1] == tiles - 1 ? tiles * KEYS - tokens : 0;
    const int keys = count * KEYS - missing, mean_tiles = (tiles + KEYS - 1) / KEYS, means = count < tiles ? mean_tiles : 0;
    const int slices = means ? (count + means) * TILE_SLICES : (keys + SLICE - 1) / SLICE;
    const u32 steps = (slices + STEP_SLICES - 1) / STEP_SLICES, tail = keys / STEP;
    if (threadIdx.x < 128) {
        fewer_registers<32>();
        if (threadIdx.x == 0) {
            barrier_expect(q_full, Q_BYTES);
            copy_bulk(q_at, q + row * Q_BYTES, Q_BYTES, q_full);
            // The last step may reach into one tile more. Its keys are hidden, but their bytes must not be NaN.
            for (int i = 0; i * KEYS < steps * STEP; ++i) {
                const bool mean = means && i >= count;
                const i64 tile = mean ? (i64)head * mean_tiles + min(i - count, means - 1)
                                      : (i64)head * tiles + list[min(i, count - 1)];
                const float scale = (mean ? mean_scale : key_scale)[tile];
                const int stage = i % STAGES;
                barrier_wait(free + stage * 8, i / STAGES % 2 ^ 1);
#pragma unroll
                for (int j = 0; j < TILE_SLICES; ++j) {
                    const int slice = stage * TILE_SLICES + j, number = (i - count) * TILE_SLICES + j;
                    const u32 at = slice / STEP_SLICES * 16 + slice % STEP_SLICES * 4;
                    const u32 marks = !mean ? marks_of(keys - (i * TILE_SLICES + j) * SLICE)
                                    : number < means * TILE_SLICES ? listed[row * mean_tiles * TILE_SLICES + number]
                                                                   : ~0u;
                    store_word(scales_at + at, scale);
                    store_word(marks_at + at, __uint_as_float(marks));
                    store_word(lifts_at + at, mean ? LOG2_KEYS : 0);
                }
                barrier_expect(full + stage * 8, K_BYTES + V_BYTES);
                copy_bulk(k_at + stage * K_BYTES, (mean ? mean_k : k) + tile * K_BYTES, K_BYTES, full + stage * 8);
                copy_bulk(v_at + stage * V_BYTES, (mean ? mean_v : v) + tile * V_BYTES, V_BYTES, full + stage * 8);
            }
        }
    } else {
        more_registers<160>();
        const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // the compiler sees one number a warp
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 all = matrix(k_at);
        constexpr int STEP_AT = STEP * ROW / 16, V_AT = STAGES * K_BYTES / 16;  // as addresses of matrices
        static_assert(STEP * ROW == STEP_SLICES * SLICE_BYTES);
        const int first = blockIdx.x * QUERIES + group * 64 + warp * 16 + lane / 4;
        Rows r;
        float o[64], shrink[2] = {1, 1}, scale[4], marks[4], lift[4];
        begin(r, o, query_scale + row * QUERIES + first - blockIdx.x * QUERIES);
        const u32 kept = kept_sums(kept_at, group);
        const float nought = __int_as_float(tokens >> 31);
        clear_kept(kept);
        const u32 my_q = matrix(q_at + group * 64 * ROW);
        barrier_wait(q_full, 0);
        barrier_wait(full, 0);
        load_shared(scale, scales_at);
        Score s[SCORES];
        u32 a[STEP_SLICES][4];
        float sums[2][2];
        first_scores(s, my_q, all);
        if (keys < STEP) hide(s, keys);
        float factor[STEP_SLICES][2];
        auto scaled = [&]() {
#pragma unroll
            for (int i = 0; i < STEP_SLICES; ++i) factor[i][0] = r.scale[0] * scale[i], factor[i][1] = r.scale[1] * scale[i];
        };
        scaled();
        largest(s, factor, r.base);
        weigh<false>(s, factor, r, a, sums);
        add(r, sums);
        auto multiply = [&](u32 step) {  // the weights before with their values, and the next scores
            const u32 before = all + (step - 1) % STEPS * STEP_AT, now = step % STEPS;
            barrier_wait(full + min(now, STAGES - 1u) * 8, step / STEPS % 2);
            load_shared(scale, scales_at + now * 16);
            wgmma_fence();
            scores(s, my_q, all + now * STEP_AT);
            wgmma_commit();
            values(o, a, before + V_AT);
            wgmma_commit();
            wgmma_wait<0>();
            // A step is over with its values, now. The first step of a turn ends no tile, step n + 1 ends tile n.
            if (threadIdx.x % 32 == 0) barrier_arrive(free + (now ^ 2) * 8);
            settled_scores(s);
            settled(o);
            scaled();
        };
        // Warpgroups add up at different steps. What is rare stays out of the inner loop.
        u32 i = 1, stop = FLUSH - group * FLUSH / CONSUMERS;
        while (i < steps) {
            bool grown = false;
            shrink[0] = shrink[1] = 1;
            const u32 end = min(stop, tail), last = min(stop, steps);
            for (; i < end && !grown; ++i) {
                multiply(i);
                grown = weigh_and_add(s, factor, r, a, sums);
            }
            for (; i < last && i >= tail && !grown; ++i) {
                multiply(i);
                load_shared(marks, marks_at + i % STEPS * 16);
                load_shared(lift, lifts_at + i % STEPS * 16);
                hide_marked(s, marks);
                grown = weigh_and_add(s, factor, r, a, sums, lift);
            }
            if (grown) {
                load_shared(lift, lifts_at + (i - 1) % STEPS * 16);
                weigh_again(s, factor, r, a, sums, shrink, lift);
                add(r, sums);
            }
            if (i >= stop) stop += FLUSH;
            keep(kept, o, shrink, nought);
        }
        last_values(o, a, all + (steps - 1) % STEPS * STEP_AT + V_AT, kept);
        const auto place = [&](int token) { return out + ((i64)places[token] * gridDim.y + head) * DIM; };
        write_rows(o, r, value_mean, value_scale, shift, lse, first, tokens, place);
    }
}
