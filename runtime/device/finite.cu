// Sets *found if an exponent has all of the bits `mask`: a NaN or an infinity (of E4M3, which has no infinity, a NaN
// when the mask takes in the mantissa).
#define NOT_FINITE(name, bits) \
    extern "C" __global__ void name(u32* found, const bits* numbers, i64 n, u32 mask) { \
        EACH(i, n) if ((numbers[i] & mask) == mask) *found = 1; \
    }
NOT_FINITE(not_finite_4, u32)
NOT_FINITE(not_finite_2, u16)
NOT_FINITE(not_finite_1, u8)
