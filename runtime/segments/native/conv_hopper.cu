// A convolution for Hopper: an implicit matrix product of pixels [M, taps * INNER] and weights [COLUMNS, taps * INNER]
// by wgmma, both operands brought to shared memory by TMA. Macros, hopper.cuh and the function `wgmma` stand in front.
//
// A block of threads computes TILE_W x TILE_H pixels of one frame and all COLUMNS. Its first warpgroup loads, two others
// multiply. The pixels that one tap in time and CHUNK channels need, margins included, are loaded once. The KR * KS taps
// of the kernel's plane read them at shifted addresses (SHIFT), or, without SHIFT, KS copies are loaded, each shifted by
// a pixel. Swizzling goes by the address, so a shifted operand needs no other descriptor.
//
// Rows of the weights are permuted so that a thread holds eight neighbouring channels: see conv_hopper_weights.cu.
//
// PARTS convolutions of the same pixels are computed by one launch. Two: their results are frames in turn. Four: each is
// one corner of a picture twice as large, and begins at the pixel there.

constexpr int GROUP = 128, WARPS = 8;  // threads of a warpgroup, warps that multiply
constexpr int ROW = CHUNK * 2;  // bytes
constexpr int A_BYTES = (TILE_H + KR - 1) * PITCH * ROW, A_STAGE = (A_BYTES + 1023) / 1024 * 1024;
constexpr int B_BYTES = COLUMNS * ROW, B_STAGE = B_BYTES;
constexpr int CHUNKS = INNER / CHUNK;
constexpr int N = COLUMNS / SPLIT;  // columns of a warpgroup
constexpr int BLOCKS = TILE_W * TILE_H / 64;  // of 8x8 pixels
constexpr int MINE = SPLIT == 2 ? BLOCKS : BLOCKS / 2;  // of a warpgroup
constexpr int WIDE = TILE_W / 8;
constexpr u64 LAYOUT = ROW == 128 ? 1 : 2;
static_assert(INNER % CHUNK == 0 && (N % 32 == 0 || (N == 8 && !NORM)), "sizes");

// An operand whose rows of ROW bytes are swizzled; groups of eight rows lie `stride` bytes apart.
__device__ u64 descriptor(u32 address, int stride) {
    return (u64)(address >> 4) | 1ull << 16 | (u64)(stride >> 4) << 32 | LAYOUT << 62;
}
struct Ring {
    int stage = 0, parity = 0;
    __device__ void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// The work of a block.
struct Tile {
    int part, frame, x, y;
    __device__ Tile(int round, int frames, int across) {
        part = round % PARTS;
        const int index = round / PARTS;
        frame = index % frames;
        const int place = index / frames;
        x = place % across * TILE_W, y = place / across * TILE_H;
    }
};

// Brings a tile of `added` to the L2 cache.
__device__ void prefetch(Tile tile, const bf16* added, int frames, int height, int width) {
    const int size = min(TILE_W, width - tile.x) * COLUMNS * 2;
    for (int y = tile.y; y < min(tile.y + TILE_H, height); ++y) {
        const bf16* from = added + (i64)((tile.frame * height + y) * width + tile.x) * COLUMNS;
        prefetch(from, size);
    }
}

__device__ void unpack(uint4 from, float* to) {
    const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
}
__device__ uint4 pack(const float* x) {
    return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
}

__device__ void eight(const float* from, float* to) {
    *(float4*)to = *(const float4*)from, *(float4*)(to + 4) = *(const float4*)(from + 4);
}

// Stores a pixel's sums in bf16 and returns the sum of their squares.
__device__ __forceinline__ float finish(const float (&sums)[N / 2], int h, bf16* y) {
    float squares = 0;
    if (N == 8 && y) *(u32*)y = pack_bf16(sums[h * 2], sums[h * 2 + 1]);
#pragma unroll
    for (int g = 0; g < N / 32; ++g) {
        float value[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            value[c] = sums[(g * 4 + c / 2) * 4 + h * 2 + c % 2];
            squares += value[c] * value[c];
        }
        if (y) *(uint4*)(y + g * 32) = pack(value);
    }
    squares += __shfl_xor_sync(~0u, squares, 1);
    return squares + __shfl_xor_sync(~0u, squares, 2);
}

// Stores x / |x| * sqrt(COLUMNS) * gamma of a pixel's values x, or silu of that.
__device__ __forceinline__ void normalize(const float (&x)[N / 2], int h, float squares, const float* gamma,
                                          bool silu, bf16* normed) {
    const float scale = rsqrtf(fmaxf(squares, 1e-24f)) * (0.5f * sqrtf((float)COLUMNS));
#pragma unroll
    for (int g = 0; g < N / 32; ++g) {
        float by[8], value[8];
        eight(gamma + g * 32, by);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const float half = x[(g * 4 + c / 2) * 4 + h * 2 + c % 2] * (scale * by[c]);
            value[c] = silu ? half + half * tanh_nearly(half) : 2 * half;
        }
        if (normed) *(uint4*)(normed + g * 32) = pack(value);
    }
}

// added, y and normed may be null. added is dense; the strides of y and normed count pixels.
extern "C" __global__ void __launch_bounds__(3 * GROUP, 1)
convolve(const __grid_constant__ Map pixel_map, const __grid_constant__ Map weight_map, const float* bias,
         const bf16* added, bf16* y, const float* gamma, bf16* normed, int silu, int frames, int height, int width,
         int pad_top, int pad_left, int frame_step, int stride_x, int stride_y, int stride_frame) {
    u8* raw = shared_memory();
    const void *pixels = &pixel_map, *weights = &weight_map;
    const u32 base = (shared_address(raw) + 1023) & ~1023u;
    const u32 a_at = base, b_at = a_at + A_STAGES * A_STAGE, barriers = b_at + B_STAGES * B_STAGE;
    const u32 a_full = barriers, a_empty = a_full + 8 * A_STAGES, b_full = a_empty + 8 * A_STAGES,
              b_empty = b_full + 8 * B_STAGES;
    const int group = threadIdx.x / GROUP, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int across = (width + TILE_W - 1) / TILE_W, down = (height + TILE_H - 1) / TILE_H;
    const int rounds = across * down * frames * PARTS;

    if (threadIdx.x == 0) {
        for (int i = 0; i < A_STAGES; ++i) barrier_init(a_full + 8 * i, 1), barrier_init(a_empty + 8 * i, WARPS);
        for (int i = 0; i < B_STAGES; ++i) barrier_init(b_full + 8 * i, 1), barrier_init(b_empty + 8 * i, WARPS);
        barriers_ready();
    }
    __syncthreads();

    if (group == 0) {
        fewer_registers<24>();
        if (warp == 0 && lane == 0) {
            Ring a, b;
            for (int round = blockIdx.x; round < rounds; round += gridDim.x) {
                if (N != 8 && added)
                    prefetch(Tile(round + gridDim.x, frames, across), added, frames, height, width);
                const Tile tile(round, frames, across);
                const int left = tile.x - pad_left + (PARTS == 4 ? tile.part % 2 : 0);
                const int top = tile.y - pad_top + (PARTS == 4 ? tile.part / 2 : 0);
                for (int kt = 0; kt < KT; ++kt)
                    for (int chunk = 0; chunk < CHUNKS; ++chunk)
                        for (int s = 0; s < KS; ++s) {
                            if (!SHIFT || s == 0) {
                                const u32 full = a_full + 8 * a.stage;
                                barrier_wait(a_empty + 8 * a.stage, a.parity ^ 1);
                                barrier_expect(full, A_BYTES);
                                load_box(a_at + a.stage * A_STAGE, pixels, full, chunk * CHUNK, left + s, top,
                                         tile.frame * frame_step + kt);
                                a.next(A_STAGES);
                            }
                            for (int r = 0; r < KR; ++r) {
                                const u32 full = b_full + 8 * b.stage, to = b_at + b.stage * B_STAGE;
                                barrier_wait(b_empty + 8 * b.stage, b.parity ^ 1);
                                barrier_expect(full, B_BYTES);
                                const int row = (((tile.part * KT + kt) * KR + r) * KS + s) * COLUMNS;
                                for (int at = 0; at < COLUMNS; at += N)
                                    load_box(to + at * ROW, weights, full, chunk * CHUNK, row + at);
                                b.next(B_STAGES);
                            }
                        }
            }
        }
    } else {
        more_registers<240>();
        const int mine = group - 1;  // a half of the pixels, or of the columns
        const int first = SPLIT == 2 ? 0 : mine * MINE;  // block of 8x8 pixels
        const int quad = lane % 4;
        float sums[MINE][N / 2];
        Ring a, b;
        for (int round = blockIdx.x; round < rounds; round += gridDim.x) {
            const Tile tile(round, frames, across);
            auto x_of = [&](int i) { return tile.x + (first + i) % WIDE * 8 + lane / 4; };
            auto y_of = [&](int i, int h) { return tile.y + (first + i) / WIDE * 8 + warp % 4 * 2 + h; };
            const int channels = (SPLIT == 2 ? mine * N : 0) + quad * (N == 8 ? 2 : 8);
            if (N == 8) {
#pragma unroll
                for (int i = 0; i < MINE; ++i)
#pragma unroll
                    for (int j = 0; j < N / 2; ++j) sums[i][j] = bias[channels + j % 2];
            }
            uint4 old[MINE][2][N / 32 + 1] = {};
            if (added) {  // all loads at once; pixels outside get a neighbour's numbers
#pragma unroll
                for (int i = 0; i < MINE; ++i)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int row = tile.frame * height + min(y_of(i, h), height - 1);
                        const bf16* from = added + ((i64)row * width + min(x_of(i), width - 1)) * COLUMNS + channels;
#pragma unroll
                        for (int g = 0; g < N / 32; ++g) old[i][h][g] = *(const uint4*)(from + g * 32);
                    }
            }
#pragma unroll
            for (int g = 0; g < N / 32; ++g) {
                float start[8], more[8];
                eight(bias + (PARTS == 2 ? tile.part * COLUMNS : 0) + channels + g * 32, start);
#pragma unroll
                for (int i = 0; i < MINE; ++i)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        unpack(old[i][h][g], more);
#pragma unroll
                        for (int c = 0; c < 8; ++c)
                            sums[i][(g * 4 + c / 2) * 4 + h * 2 + c % 2] = start[c] + more[c];
                    }
            }
            int done_a = -1, done_b = -1;
            for (int step = 0; step < KT * CHUNKS; ++step)
                for (int s = 0; s < KS; ++s) {
                    if (!SHIFT || s == 0) barrier_wait(a_full + 8 * a.stage, a.parity);
                    for (int r = 0; r < KR; ++r) {
                        barrier_wait(b_full + 8 * b.stage, b.parity);
                        const u32 from = a_at + a.stage * A_STAGE + (r * PITCH + (SHIFT ? s : 0)) * ROW;
                        const u32 columns = b_at + b.stage * B_STAGE + (SPLIT == 2 ? mine * N * ROW : 0);
                        const u64 left = descriptor(from, PITCH * ROW), right = descriptor(columns, 8 * ROW);
                        wgmma_fence();
#pragma unroll
                        for (int k = 0; k < CHUNK / 16; ++k) {
#pragma unroll
                            for (int i = 0; i < MINE; ++i) {
                                const int block = first + i;
                                const int at = (block / WIDE * 8 * PITCH + block % WIDE * 8) * ROW + k * 32;
                                wgmma(sums[i], left + (at >> 4), right + (k * 32 >> 4));
                            }
                        }
                        wgmma_commit();
                        wgmma_wait<1>();
                        if (done_b >= 0 && lane == 0) barrier_arrive(b_empty + 8 * done_b);
                        if (done_a >= 0 && lane == 0) barrier_arrive(a_empty + 8 * done_a);
                        done_b = b.stage, done_a = -1;
                        b.next(B_STAGES);
                    }
                    if (!SHIFT || s == KS - 1) {
                        done_a = a.stage;
                        a.next(A_STAGES);
                    }
                }
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < MINE; ++i)
#pragma unroll
                for (int j = 0; j < N / 2; ++j) written(sums[i][j]);
            if (lane == 0) barrier_arrive(b_empty + 8 * done_b);
            if (lane == 0) barrier_arrive(a_empty + 8 * done_a);

            const int offset = PARTS == 4 ? tile.part / 2 * (stride_y / 2) + tile.part % 2
                             : PARTS == 2 ? tile.part * (stride_frame / 2) : 0;
            auto place = [&](bf16* tensor, int i, int h) -> bf16* {
                if (!tensor || x_of(i) >= width || y_of(i, h) >= height) return nullptr;
                const int at = tile.frame * stride_frame + y_of(i, h) * stride_y + x_of(i) * stride_x + offset;
                return tensor + (i64)at * COLUMNS + channels;
            };
            float squares[MINE][2];  // sums of y's squares by pixel
#pragma unroll
            for (int i = 0; i < MINE; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    squares[i][h] = finish(sums[i], h, place(y, i, h));
#if NORM && SPLIT == 1
                    normalize(sums[i], h, squares[i][h], gamma + channels, silu, place(normed, i, h));
#endif
                }
#if NORM && SPLIT == 2
            float* halves = (float*)(raw + (b_empty + 8 * B_STAGES - shared_address(raw)));  // [2, BLOCKS * 64]
            const int row = warp % 4 * 8 + lane / 4;
#pragma unroll
            for (int i = 0; i < MINE; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (quad == 0) halves[mine * BLOCKS * 64 + (i * 2 + h) * 32 + row] = squares[i][h];
            sync_threads<1, 2 * GROUP>();
#pragma unroll
            for (int i = 0; i < MINE; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float other = halves[(1 - mine) * BLOCKS * 64 + (i * 2 + h) * 32 + row];
                    normalize(sums[i], h, squares[i][h] + other, gamma + channels, silu, place(normed, i, h));
                }
            sync_threads<1, 2 * GROUP>();
#endif
        }
    }
}
