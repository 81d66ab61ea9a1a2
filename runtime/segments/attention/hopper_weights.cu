// Weights of the self-attention on Hopper: the softmax of a step, STEP keys.
//
// Weights are computed with the largest score of a step before, and once more if one of them may not fit into E4M3. So most
// steps are not searched for their largest score.

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LIFT = 5.0f;  // weights are at most 2^LIFT of a row whose largest score is known
constexpr float MAGIC = 12582912.0f;  // 2^23 + 2^22: the bits of MAGIC + n are those of MAGIC, plus n
constexpr int MAGIC_BITS = 0x4B400000;
constexpr int LEAST = (int)(0xFF800000u - 0x4B400000u);  // becomes -infinity

// A score as a number of MAGIC + n, or as it is.
__device__ float number(int s) { return __int_as_float(s + MAGIC_BITS); }
__device__ float number(float s) { return s; }
__device__ float plain(int s) { return (float)s; }
__device__ float plain(float s) { return s; }
__device__ int larger(int a, int b) { return max(a, b); }
__device__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ Score least() {
#if QK == 0
    return LEAST;
#else
    return -infinity();
#endif
}

__device__ float power_of_2(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // volatile: before the wait for the values
    return y;
}

// Never stores, for x is positive. ptxas would else put the work that leads to x behind the next wait for products.
__device__ void needed(float x, u32 address) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}"
                 :: "f"(x), "r"(address) : "memory");
}

struct Rows {  // of a thread: two, shared by four threads
    float base[2], sum[2], scale[2];  // a weight is 2^(base + score)
};

// Of a row's four sums, added up over 12 weights at most, one exceeds this before a weight exceeds 448. With the true
// maximum they are 12 * 2^LIFT at most.
constexpr float LIMIT = 448.0f;

__device__ void hide(Score (&s)[SCORES], int valid) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < SCORES; ++i)
        if (i / 4 * 8 + column + i % 2 >= valid) s[i] = least();
}

// Hides the keys whose bits are set. `marks` has a word for 32 keys.
__device__ void hide_marked(Score (&s)[SCORES], const float (&marks)[4]) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < SCORES; ++i)
        if (__float_as_uint(marks[i / 16]) >> column >> (i / 4 % 4 * 8 + i % 2) & 1) s[i] = least();
}

// The base with which each row's largest score has a weight of 2^LIFT. `factor` has a number for each of SCALED equal parts of the
// keys and both rows. `lift`, or null, has one for each part, whose weights are 2^lift times as large.
template <int SCALED>
__device__ void largest(const Score (&s)[SCORES], const float (&factor)[SCALED][2], float (&base)[2], const float* lift = nullptr) {
    constexpr int PART = SCORES / SCALED;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float high = 0;
#pragma unroll
        for (int part = 0; part < SCALED; ++part) {
            Score most[2] = {s[part * PART + 2 * half], s[part * PART + 2 * half + 1]};
#pragma unroll
            for (int i = part * PART + 4 + 2 * half; i < (part + 1) * PART; i += 4)
                most[0] = larger(most[0], s[i]), most[1] = larger(most[1], s[i + 1]);
            float whole = plain(larger(most[0], most[1])) * factor[part][half];
            if (lift) whole += lift[part];
            high = part ? fmaxf(high, whole) : whole;
        }
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        base[half] = LIFT - fmaxf(high, __shfl_xor_sync(~0u, high, 2));
    }
}

// Scores to packed weights and their sums, with the rows' bases as they are. With AGAIN the same scores become numbers in
// another way, or ptxas would keep the numbers of the first time in registers.
template <bool AGAIN, int SCALED>
__device__ void weigh(const Score (&s)[SCORES], const float (&factor)[SCALED][2], const Rows& r, u32 (&a)[STEP_SLICES][4],
                      float (&sums)[2][2], const float* lift = nullptr) {
    float offset[SCALED][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int part = 0; part < SCALED; ++part)
            offset[part][half] = (lift ? r.base[half] + lift[part] : r.base[half]) -
                                 (QK == 0 && !AGAIN ? MAGIC * factor[part][half] : 0.0f);
        sums[half][0] = sums[half][1] = 0;
    }
    auto weight = [&](int i) {
        const int half = i / 2 % 2, part = i / (SCORES / SCALED);
        const float n = AGAIN ? plain(s[i]) : number(s[i]);
        float y = power_of_2(fmaf(n, factor[part][half], offset[part][half]));
        if (AGAIN && s[i] == least()) y = 0;  // as a plain number it is not -infinity
        sums[half][i % 2] += y;
        return y;
    };
#pragma unroll
    for (int g = 0; g < STEP_SLICES; ++g)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = (PV == 1 ? 2 * g + i / 2 : 4 * g + i / 2 * 2) * 4 + i % 2 * 2;
            const float first = weight(at), second = weight(at + 1);
#if PV == 1
            a[g][i] = pack_bf16(first, second);
#else
            const float third = weight(at + 4), fourth = weight(at + 5);
            a[g][i] = pack_e4m3(first, second) | pack_e4m3(third, fourth) << 16;
#endif
        }
}

__device__ void add(Rows& r, const float (&sums)[2][2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) r.sum[half] += sums[half][0] + sums[half][1];
}

// True if a weight may not fit, in one row of the warp: then `weigh_again`.
__device__ bool too_large(const float (&sums)[2][2]) {
    return __any_sync(~0u, fmaxf(fmaxf(sums[0][0], sums[0][1]), fmaxf(sums[1][0], sums[1][1])) > LIMIT);
}

// Weighs, and adds the sums up unless a weight may not fit. Returns whether that is so.
template <int SCALED>
__device__ bool weigh_and_add(const Score (&s)[SCORES], const float (&factor)[SCALED][2], Rows& r, u32 (&a)[STEP_SLICES][4],
                              float (&sums)[2][2], const float* lift = nullptr) {
    weigh<false>(s, factor, r, a, sums, lift);
    const bool grown = too_large(sums);
    if (!grown) add(r, sums);
    return grown;
}

// With the rows' true maxima. What was added up before must be shrunk by `shrink`.
template <int SCALED>
__device__ void weigh_again(const Score (&s)[SCORES], const float (&factor)[SCALED][2], Rows& r, u32 (&a)[STEP_SLICES][4],
                            float (&sums)[2][2], float (&shrink)[2], const float* lift = nullptr) {
    float base[2];
    largest(s, factor, base, lift);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        base[half] = fminf(r.base[half], base[half]);
        shrink[half] = power_of_2(base[half] - r.base[half]);
        r.base[half] = base[half];
        r.sum[half] *= shrink[half];
    }
    weigh<true>(s, factor, r, a, sums, lift);
}

// Scores to packed weights; true if what was added up before must be shrunk by `shrink`.
template <bool FIRST>
__device__ bool soften(Score (&s)[SCORES], u32 (&a)[STEP_SLICES][4], Rows& r, float key_scale, int valid,
                       float (&shrink)[2]) {
    if (valid < STEP) hide(s, valid);
    const float factor[1][2] = {{r.scale[0] * key_scale, r.scale[1] * key_scale}};
    float sums[2][2];
    bool grown = false;
    if (FIRST) largest(s, factor, r.base);
    if (!FIRST) shrink[0] = shrink[1] = 1;
    weigh<false>(s, factor, r, a, sums);
    if (!FIRST && (grown = too_large(sums))) weigh_again(s, factor, r, a, sums, shrink);
    add(r, sums);
    return grown;
}
