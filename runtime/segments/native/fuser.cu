// The arithmetic of a fuser between its matrix products. Stands behind block.cu and uses its loads, norm and macros.

constexpr int FACE_KEYS = FACE_TOKENS;
constexpr int FACE_TOKENS_AT_ONCE = 8;  // loads in flight

// Attention of a slot's tokens to its few face tokens. A warp has two heads, 8 channels per thread, and keeps keys and
// values in registers while it goes through tokens. blockIdx: part of a slot, pair of heads, slot. The product comes
// without its bias; token_scale is null if it needs no scales. q's RMS norm is over a head's channels.
extern "C" __global__ void __launch_bounds__(128)
face_attention(const bf16* product, const float* token_scale, const float* weight_scale, const float* bias,
               const float* norm, const bf16* face_k, const bf16* face_v, bf16* out, int tokens_of_slot) {
    const int lane = threadIdx.x % 16, channel = blockIdx.y * 2 * HEAD_DIM + threadIdx.x % 32 * 8;
    const i64 head = channel / HEAD_DIM, slot = blockIdx.z;
    float k[FACE_KEYS][8], v[FACE_KEYS][8], w[8], b[8], s[8];
    load_shared_by_tokens(norm + lane * 8, w);
    load_shared_by_tokens(bias + channel, b);
    if (token_scale) load_shared_by_tokens(weight_scale + channel, s);
#pragma unroll
    for (int n = 0; n < FACE_KEYS; ++n) {
        const i64 at = ((slot * HEADS + head) * FACE_KEYS + n) * HEAD_DIM + lane * 8;
        load(face_k + at, k[n]);
        load(face_v + at, v[n]);
#pragma unroll
        for (int i = 0; i < 8; ++i) k[n][i] *= w[i] * (SOFTMAX_SCALE * LOG2_E);
    }
    const int warps = gridDim.x * 4;
    for (int begin = (blockIdx.x * 4 + threadIdx.x / 32) * FACE_TOKENS_AT_ONCE; begin < tokens_of_slot;
         begin += warps * FACE_TOKENS_AT_ONCE) {
        float loaded[FACE_TOKENS_AT_ONCE][8];
#pragma unroll
        for (int t = 0; t < FACE_TOKENS_AT_ONCE; ++t)
            load(product + (slot * tokens_of_slot + min(begin + t, tokens_of_slot - 1)) * DIM + channel, loaded[t]);
#pragma unroll
        for (int t = 0; t < FACE_TOKENS_AT_ONCE; ++t) {
            if (begin + t >= tokens_of_slot) break;
            const i64 token = slot * tokens_of_slot + begin + t;
            float (&y)[8] = loaded[t];
            float sums[1 + FACE_KEYS] = {};  // of squares, then logits
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                y[i] = token_scale ? y[i] * (token_scale[token] * s[i]) + b[i] : y[i] + b[i];
                sums[0] += y[i] * y[i];
#pragma unroll
                for (int n = 0; n < FACE_KEYS; ++n) sums[1 + n] += y[i] * k[n][i];
            }
#pragma unroll
            for (int distance = 8; distance; distance /= 2)
#pragma unroll
                for (int n = 0; n < 1 + FACE_KEYS; ++n) sums[n] += __shfl_xor_sync(~0u, sums[n], distance);
            const float inverse = rsqrtf(sums[0] * (1.0f / HEAD_DIM) + EPS);
            float most = -infinity(), sum = 0, result[8] = {};
#pragma unroll
            for (int n = 0; n < FACE_KEYS; ++n) most = fmaxf(most, sums[1 + n]);
#pragma unroll
            for (int n = 0; n < FACE_KEYS; ++n) {
                const float p = power_of_2((sums[1 + n] - most) * inverse);
                sum += p;
#pragma unroll
                for (int i = 0; i < 8; ++i) result[i] += p * v[n][i];
            }
            const float part = 1.0f / sum;
#pragma unroll
            for (int i = 0; i < 8; ++i) result[i] *= part;
            store(out + token * DIM + channel, result);
        }
    }
}

// The layer norm without weights, as bf16.
extern "C" __global__ void __launch_bounds__(DIM_THREADS) norm_tokens(const float* x, bf16* out) {
    float values[STREAM_VECTORS][4];
#pragma unroll
    for (int v = 0; v < STREAM_VECTORS; ++v)
        load(x + (i64)blockIdx.x * DIM + (v * DIM_THREADS + threadIdx.x) * 4, values[v]);
    norm(values, nullptr, nullptr);
#pragma unroll
    for (int v = 0; v < STREAM_VECTORS; ++v)
        *(uint2*)(out + (i64)blockIdx.x * DIM + (v * DIM_THREADS + threadIdx.x) * 4) =
            make_uint2(pack_bf16(values[v][0], values[v][1]), pack_bf16(values[v][2], values[v][3]));
}

// x + (product + bias) * strength[0]
extern "C" __global__ void __launch_bounds__(DIM_THREADS)
add_face(const float* x, const bf16* product, const float* token_scale, const float* weight_scale, const float* bias,
         const float* strength, float* x_out) {
#pragma unroll
    for (int v = 0; v < STREAM_VECTORS; ++v) {
        const int channel = (v * DIM_THREADS + threadIdx.x) * 4;
        const i64 at = (i64)blockIdx.x * DIM + channel;
        float values[4], y[4], b[4], s[4];
        load(x + at, values);
        load(product + at, y);
        load_shared_by_tokens(bias + channel, b);
        if (token_scale) load_shared_by_tokens(weight_scale + channel, s);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            values[i] += strength[0] * (token_scale ? y[i] * (token_scale[blockIdx.x] * s[i]) + b[i] : y[i] + b[i]);
        store(x_out + at, values);
    }
}
