// The VAE between its convolutions. Pictures are bf16 [frames, height, width, channels]; a pixel is a position of one
// frame. The caches of the contract are [channels, frames, height, width]. Divisions are of 32 bits, which are several
// times quicker than those of 64: no tensor has 2^32 vectors of eight channels.

// The source begins with THREADS, of a block, with LATENT, the channels of a latent, and with their means and deviations.

constexpr int CHANNELS_3 = 8;  // three channels, filled up with zeros to a vector
constexpr int GATHERED = 32;   // 27 channels, filled up with zeros
typedef Vector<u32, 4> Eight;  // numbers in bf16
typedef Vector<u32, 2> Four;

__device__ float rounded(float x) { return __uint_as_float(pack_bf16(x, 0) << 16); }

__device__ void unpack(Eight from, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(from.x[i] << 16);
        x[2 * i + 1] = __uint_as_float(from.x[i] & 0xFFFF0000u);
    }
}

__device__ Eight pack(const float (&x)[8]) {
    Eight packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.x[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    return packed;
}

__device__ void add(const bf16* from, float (&x)[8]) {
    float other[8];
    unpack(*(const Eight*)from, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += other[i];
}

__device__ void add(const float* from, float (&x)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Vector<float, 4> four = ((const Vector<float, 4>*)from)[half];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * half + i] += four.x[i];
    }
}

__device__ constexpr int lanes_for(int vectors, int most = 32) {
    return vectors % 2 || most == 1 ? 1 : 2 * lanes_for(vectors / 2, most / 2);
}

// Finishes a convolution and prepares the next one: x = y + bias (+ added + its bias), written to `raw`, and the RMS
// norm of x over the channels times `gamma`, then SiLU, written to `normed`. All but y and `pixels` may be null.
template <int C>
__device__ void finish(const bf16* y, const float* bias, const bf16* added, const float* added_bias, bf16* raw,
                       const float* gamma, bf16* normed, i64 pixels, int silu) {
    constexpr int LANES = lanes_for(C / 8), EACH_LANE = C / 8 / LANES;  // threads of a pixel, vectors of a thread
    const int lane = threadIdx.x % LANES, together = blockDim.x / LANES;
    float b[EACH_LANE][8], g[EACH_LANE][8];
#pragma unroll
    for (int v = 0; v < EACH_LANE; ++v) {
        const int channel = (v * LANES + lane) * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) b[v][i] = g[v][i] = 0;
        if (bias) add(bias + channel, b[v]);
        if (added_bias) add(added_bias + channel, b[v]);
        if (gamma) add(gamma + channel, g[v]);
    }
    for (i64 first = blockIdx.x * (i64)together; first < pixels; first += gridDim.x * (i64)together) {
        const i64 pixel = first + threadIdx.x / LANES;
        const bool there = pixel < pixels;
        const i64 from = (there ? pixel : 0) * C + lane * 8;
        float x[EACH_LANE][8];
#pragma unroll
        for (int v = 0; v < EACH_LANE; ++v) unpack(*(const Eight*)(y + from + v * LANES * 8), x[v]);
        if (added) {
#pragma unroll
            for (int v = 0; v < EACH_LANE; ++v) add(added + from + v * LANES * 8, x[v]);
        }
        float squares = 0;
#pragma unroll
        for (int v = 0; v < EACH_LANE; ++v)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                x[v][i] += b[v][i];
                squares += x[v][i] * x[v][i];
            }
        if (raw && there) {
#pragma unroll
            for (int v = 0; v < EACH_LANE; ++v) *(Eight*)(raw + from + v * LANES * 8) = pack(x[v]);
        }
        if (!gamma) continue;
#pragma unroll
        for (int other = LANES / 2; other; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
        const float scale = rsqrtf(fmaxf(squares, 1e-24f)) * sqrtf((float)C);
#pragma unroll
        for (int v = 0; v < EACH_LANE; ++v) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                x[v][i] *= scale * g[v][i];
                if (silu) x[v][i] = __fdividef(x[v][i], 1.0f + __expf(-x[v][i]));
            }
            if (there) *(Eight*)(normed + from + v * LANES * 8) = pack(x[v]);
        }
    }
}

#define FINISH(C) \
    extern "C" __global__ void __launch_bounds__(THREADS) \
    finish_##C(const bf16* y, const float* bias, const bf16* added, const float* added_bias, bf16* raw, \
               const float* gamma, bf16* normed, i64 pixels, int silu) { \
        finish<C>(y, bias, added, added_bias, raw, gamma, normed, pixels, silu); \
    }

// [rows, columns] to [columns, rows], both multiples of 4; a block per tile, of 16-bit numbers. In shared memory a word
// has two rows of a column. Warps write 4 pairs of rows by 32 columns and read 4 columns by 64 rows, each from 32 banks.
extern "C" __global__ void __launch_bounds__(THREADS)
transpose(const bf16* from, bf16* to, i64 rows, i64 columns) {
    constexpr int SIDE = 64, PITCH = SIDE / 2 + 1, UNITS = SIDE * SIDE / 8;  // of eight numbers
    __shared__ u32 tile[SIDE * PITCH];
    const i64 high = (rows + SIDE - 1) / SIDE, wide = (columns + SIDE - 1) / SIDE;  // in tiles, the fewer first
    const i64 row = (high < wide ? blockIdx.x % high : blockIdx.x / wide) * SIDE;
    const i64 column = (high < wide ? blockIdx.x / high : blockIdx.x % wide) * SIDE;
#pragma unroll
    for (int i = threadIdx.x; i < UNITS; i += THREADS) {
        const int r = i / 64 * 8 + i / 8 % 4 * 2, c = i / 32 % 2 * 32 + i % 8 * 4;
        if (row + r >= rows || column + c >= columns) continue;
        const bf16* at = from + (row + r) * columns + column + c;
        const Four upper = *(const Four*)at, lower = *(const Four*)(at + columns);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            tile[(c + 2 * j) * PITCH + r / 2] = (upper.x[j] & 0xFFFF) | lower.x[j] << 16;
            tile[(c + 2 * j + 1) * PITCH + r / 2] = upper.x[j] >> 16 | (lower.x[j] & 0xFFFF0000u);
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < UNITS; i += THREADS) {
        const int c = i / 8, r = i % 8 * 8;
        if (column + c >= columns) continue;
        const u32* words = tile + c * PITCH + r / 2;
        bf16* at = to + (column + c) * rows + row + r;
        if (row + r < rows) *(Four*)at = Four{{words[0], words[1]}};
        if (row + r + 4 < rows) *(Four*)(at + 4) = Four{{words[2], words[3]}};
    }
}

extern "C" __global__ void zero(Eight* to, i64 vectors) {
    EACH(i, vectors) to[i] = Eight{{0, 0, 0, 0}};
}

// A convolution's weight [out, inner, taps] to [out_wanted, taps, inner_wanted], filled up with zeros.
extern "C" __global__ void repack(const bf16* from, bf16* to, u32 out, u32 inner, u32 taps, i64 out_wanted,
                                  u32 inner_wanted) {
    const u32 vectors = inner_wanted / 8;
    EACH(i, out_wanted * vectors * taps) {
        const u32 tap = (u32)i % taps, first = (u32)i / taps % vectors * 8, o = (u32)i / taps / vectors;
        u32 x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
            x[j] = o < out && first + j < inner ? from[((i64)o * inner + first + j) * taps + tap].bits : 0;
        Eight packed;
#pragma unroll
        for (int j = 0; j < 4; ++j) packed.x[j] = x[2 * j] | x[2 * j + 1] << 16;
        *(Eight*)(to + ((i64)o * taps + tap) * inner_wanted + first) = packed;
    }
}

// Three channels are few for a convolution. So a pixel gets, as its channels, the three channels of 3 pixels side by side
// in 3 frames: [n, height, width, GATHERED] of `frames` [3, n, height, width] behind the two frames of `cache`, which
// are zeros if it is null. The order is (pixel, frame, channel). The last two of all frames go to `cache_out`.
extern "C" __global__ void gather(const float* frames, const bf16* cache, bf16* to, bf16* cache_out, i64 n, u32 height,
                                  u32 width) {
    const i64 pixels = (i64)height * width;
    EACH(i, n * pixels) {
        const i64 first = (u32)i / (u32)pixels, pixel = (u32)i % (u32)pixels;  // the first frame of three
        const int column = (u32)pixel % width;
        float x[GATHERED] = {0};
#pragma unroll
        for (int s = 0; s < 3; ++s) {
            if (column + s < 1 || column + s > width) continue;
#pragma unroll
            for (int t = 0; t < 3; ++t)
#pragma unroll
                for (int c = 0; c < 3; ++c) {
                    const i64 frame = first + t, at = pixel + s - 1;
                    float& value = x[(s * 3 + t) * 3 + c];
                    if (frame >= 2) value = frames[(c * n + frame - 2) * pixels + at];
                    else if (cache) value = load(cache + (c * 2 + frame) * pixels + at);
                    if (s == 1 && t && first == n - 1) store(cache_out + (c * 2 + t - 1) * pixels + pixel, value);
                }
        }
#pragma unroll
        for (int v = 0; v < GATHERED / 8; ++v) {
            float eight[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) eight[j] = x[v * 8 + j];
            *(Eight*)(to + i * GATHERED + v * 8) = pack(eight);
        }
    }
}

// The weight [out, 3, frames, rows, pixels] of that convolution to [out, GATHERED, rows].
extern "C" __global__ void gather_weight(const bf16* from, bf16* to, i64 out) {
    EACH(i, out * GATHERED * 3) {
        const u32 r = (u32)i % 3, k = (u32)i / 3 % GATHERED, o = (u32)i / 3 / GATHERED;
        const u32 c = k % 3, t = k / 3 % 3, s = k / 9;
        to[i].bits = k < 27 ? from[(((o * 3 + c) * 3 + t) * 3 + r) * 3 + s].bits : 0;
    }
}

extern "C" __global__ void frames_out(const bf16* y, const float* bias, float* frames, i64 pixels) {
    EACH(i, pixels) {
        float x[8];
        unpack(*(const Eight*)(y + i * CHANNELS_3), x);
#pragma unroll
        for (int c = 0; c < 3; ++c) frames[c * pixels + i] = x[c] + bias[c];
    }
}

// A normalised latent [LATENT, pixels] through the decoder's first layer, a product of channels. `count` is that of `to`.
extern "C" __global__ void latent_in(const float* latent, const bf16* w, const float* bias, bf16* to, i64 count) {
    const i64 pixels = count / LATENT;
    EACH(i, count) {
        const u32 o = (u32)i % LATENT, pixel = (u32)i / LATENT;
        float sum = bias[o];
#pragma unroll
        for (int c = 0; c < LATENT; ++c)
            sum += load(w + o * LATENT + c) * rounded(latent[c * pixels + pixel] * LATENT_STD[c] + LATENT_MEAN[c]);
        store(to + i, sum);
    }
}

// The encoder's last layer, a product of channels, of which only the mean is needed, and normalised.
extern "C" __global__ void latent_out(const bf16* y, const float* y_bias, const bf16* w, const float* bias,
                                      float* latent, i64 pixels) {
    EACH(i, pixels) {
        float x[2 * LATENT];
#pragma unroll
        for (int c = 0; c < 2 * LATENT; ++c) x[c] = rounded(load(y + i * (2 * LATENT) + c) + y_bias[c]);
        for (int o = 0; o < LATENT; ++o) {
            float sum = bias[o];
#pragma unroll
            for (int c = 0; c < 2 * LATENT; ++c) sum += load(w + o * (2 * LATENT) + c) * x[c];
            latent[o * pixels + i] = (rounded(sum) - LATENT_MEAN[o]) / LATENT_STD[o];
        }
    }
}

// Pictures twice as high and wide. Their frames are `parts` for each of `pixels / (height * width)` frames, which have
// them in neighbouring groups of `channels`.
extern "C" __global__ void enlarge(const bf16* from, const float* bias, bf16* to, i64 pixels, u32 height, u32 width,
                                   u32 channels, u32 parts) {
    const u32 vectors = channels / 8;
    EACH(i, pixels * parts * vectors) {
        const u32 vector = (u32)i % vectors, group = (u32)i / vectors, part = group % parts, pixel = group / parts;
        const u32 x = pixel % width, y = pixel / width % height, frame = pixel / (width * height) * parts + part;
        float values[8];
        Eight eight = ((const Eight*)from)[i];
        if (bias) {
            unpack(eight, values);
            add(bias + (part * vectors + vector) * 8, values);
            eight = pack(values);
        }
        Eight* corner = (Eight*)to + (((i64)frame * 2 * height + 2 * y) * 2 * width + 2 * x) * vectors + vector;
        corner[0] = corner[vectors] = eight;
        corner[2 * width * vectors] = corner[(2 * width + 1) * vectors] = eight;
    }
}

extern "C" __global__ void add_bias(bf16* y, const float* bias, i64 pixels, u32 channels) {
    const u32 vectors = channels / 8;
    EACH(i, pixels * vectors) {
        float x[8];
        unpack(((const Eight*)y)[i], x);
        add(bias + (u32)i % vectors * 8, x);
        ((Eight*)y)[i] = pack(x);
    }
}

// The softmax of rows of `keys` scores; a block per row.
extern "C" __global__ void __launch_bounds__(THREADS) softmax(const float* scores, bf16* weights, i64 keys) {
    __shared__ float shared[THREADS];
    const float* row = scores + blockIdx.x * keys;
    float most = -infinity();
    for (i64 i = threadIdx.x; i < keys; i += blockDim.x) most = fmaxf(most, row[i]);
    most = largest_of_block(most, shared);
    __syncthreads();
    float sum = 0;
    for (i64 i = threadIdx.x; i < keys; i += blockDim.x) sum += __expf(row[i] - most);
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    const float factor = 1.0f / shared[0];
    bf16* to = weights + blockIdx.x * keys;
    for (i64 i = threadIdx.x; i < keys; i += blockDim.x) store(to + i, __expf(row[i] - most) * factor);
}
