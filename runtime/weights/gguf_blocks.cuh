// GGUF's blocks to float32, number by number. numbers.cuh stands in front.
//
// A type has the numbers and bytes of its block, and `at`: number j of the block.
// Products and sums are rounded one by one, as the gguf package does: its values are reached bit for bit.

// A half at any even address.
__device__ float half_at(const u8* from) { return widen(*(const fp16*)from); }
// q * d + m with two roundings.
__device__ float line(float q, float d, float m) { return __fadd_rn(__fmul_rn(d, q), m); }
// A number of 4 bits out of `bytes`: first all lower halves, then all upper ones.
__device__ int nibble(const u8* bytes, int width, int j) { return bytes[j % width] >> (j / width * 4) & 15; }
// Bit j / 32 of byte j % 32.
__device__ int bit(const u8* bytes, int j) { return bytes[j % 32] >> j / 32 & 1; }
// A number of 2 bits: 32 bytes hold 128 of them.
__device__ int two_bits(const u8* bytes, int j) { return bytes[j / 128 * 32 + j % 32] >> j % 128 / 32 * 2 & 3; }

struct Q8_0 {
    static constexpr int numbers = 32, bytes = 34;
    __device__ static float at(const u8* block, int j) { return __fmul_rn((signed char)block[2 + j], half_at(block)); }
};

struct Q4_0 {
    static constexpr int numbers = 32, bytes = 18;
    __device__ static float at(const u8* block, int j) { return __fmul_rn(half_at(block), nibble(block + 2, 16, j) - 8); }
};

struct Q4_1 {
    static constexpr int numbers = 32, bytes = 20;
    __device__ static float at(const u8* block, int j) {
        return line(nibble(block + 4, 16, j), half_at(block), half_at(block + 2));
    }
};

// The fifth bits of 32 numbers in 4 bytes, in order.
__device__ int fifth(const u8* bits, int j) { return (bits[j / 8] >> j % 8 & 1) << 4; }

struct Q5_0 {
    static constexpr int numbers = 32, bytes = 22;
    __device__ static float at(const u8* block, int j) {
        return __fmul_rn(half_at(block), (nibble(block + 6, 16, j) | fifth(block + 2, j)) - 16);
    }
};

struct Q5_1 {
    static constexpr int numbers = 32, bytes = 24;
    __device__ static float at(const u8* block, int j) {
        return line(nibble(block + 8, 16, j) | fifth(block + 4, j), half_at(block), half_at(block + 2));
    }
};

struct Q2_K {
    static constexpr int numbers = 256, bytes = 84;
    __device__ static float at(const u8* block, int j) {
        const int scale = block[j / 16];
        const float d = __fmul_rn(half_at(block + 80), scale & 15), m = __fmul_rn(half_at(block + 82), scale >> 4);
        return line(two_bits(block + 16, j), d, -m);
    }
};

struct Q3_K {
    static constexpr int numbers = 256, bytes = 110;
    __device__ static float at(const u8* block, int j) {
        const u8* scales = block + 96;  // 4 lower bits of 16 scales, then the 2 upper ones
        const int k = j / 16, scale = nibble(scales, 8, k) | (scales[8 + k % 4] >> k / 4 * 2 & 3) << 4;
        const int q = two_bits(block + 32, j) - (bit(block, j) ? 0 : 4);
        return __fmul_rn(__fmul_rn(half_at(block + 108), scale - 32), q);
    }
};

// The scale and the minimum of sub-block k of 8, 6 bits each, in 12 bytes.
__device__ int k_scale(const u8* s, int k) { return k < 4 ? s[k] & 63 : (s[k + 4] & 15) | (s[k - 4] >> 2 & 48); }
__device__ int k_minimum(const u8* s, int k) { return k < 4 ? s[k + 4] & 63 : s[k + 4] >> 4 | (s[k] >> 2 & 48); }

// Number j, of which q is the stored part, in a block that begins with a scale, a minimum and those of sub-blocks.
__device__ float k_line(const u8* block, int j, int q) {
    const float d = __fmul_rn(half_at(block), k_scale(block + 4, j / 32));
    return line(q, d, -__fmul_rn(half_at(block + 2), k_minimum(block + 4, j / 32)));
}

struct Q4_K {
    static constexpr int numbers = 256, bytes = 144;
    __device__ static float at(const u8* block, int j) {
        return k_line(block, j, nibble(block + 16 + j / 64 * 32, 32, j % 64));
    }
};

struct Q5_K {
    static constexpr int numbers = 256, bytes = 176;
    __device__ static float at(const u8* block, int j) {
        return k_line(block, j, nibble(block + 48 + j / 64 * 32, 32, j % 64) | bit(block + 16, j) << 4);
    }
};

struct Q6_K {
    static constexpr int numbers = 256, bytes = 210;
    __device__ static float at(const u8* block, int j) {
        const int q = (nibble(block + j / 128 * 64, 64, j % 128) | two_bits(block + 128, j) << 4) - 32;
        return __fmul_rn(__fmul_rn(half_at(block + 208), (signed char)block[192 + j / 16]), q);
    }
};

#define FROM_BLOCKS(Type) \
    extern "C" __global__ void convert_##Type##_to_float32( \
        const u8* in, const float* no_scales, float* out, i64 rows, i64 inner) { \
        EACH(i, rows * inner) out[i] = Type::at(in + i / Type::numbers * Type::bytes, i % Type::numbers); \
    }

FROM_BLOCKS(Q8_0)
FROM_BLOCKS(Q5_0)
FROM_BLOCKS(Q5_1)
FROM_BLOCKS(Q4_0)
FROM_BLOCKS(Q4_1)
FROM_BLOCKS(Q2_K)
FROM_BLOCKS(Q3_K)
FROM_BLOCKS(Q4_K)
FROM_BLOCKS(Q5_K)
FROM_BLOCKS(Q6_K)
