// The weights of conv_hopper.cu, with its macros.

// [GIVEN_OUT, INNER, taps] of the checkpoint to [PARTS, taps, COLUMNS, INNER]. The columns are permuted: a thread of
// wgmma holds columns 2q and 2q + 1 of every eight, and gets channels 8q to 8q + 7 of 32. Of four parts, the taps of 3x3
// that fall on the same pixel of the smaller picture are added. Columns that are not given are zero. Behind the weights
// lies the bias, plus `added_bias`; both may be null.
extern "C" __global__ void __launch_bounds__(256)
repack_for_hopper(const bf16* from, const float* bias, const float* added_bias, bf16* to) {
    constexpr int TAPS = KT * KR * KS, OUT = (PARTS == 2 ? 2 : 1) * COLUMNS;
    constexpr int GIVEN = PARTS == 4 ? 9 : TAPS;
    float* bias_to = (float*)(to + (i64)PARTS * TAPS * COLUMNS * INNER);
    EACH(i, OUT) {
        float sum = 0;
        if (i < GIVEN_OUT && bias) sum += bias[i];
        if (i < GIVEN_OUT && added_bias) sum += added_bias[i];
        bias_to[i] = sum;
    }
    EACH(i, (i64)OUT * INNER) {
        const int inner = i % INNER, column = i / INNER % COLUMNS, part = i / INNER / COLUMNS;
        const int swapped = column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
        const int channel = part * COLUMNS + (COLUMNS < 32 ? column : swapped);
        const bf16* w = from + ((i64)channel * INNER + inner) * GIVEN;
        bf16* out = to + ((i64)part * TAPS * COLUMNS + column) * INNER + inner;
        if (PARTS != 4) {
            for (int tap = 0; tap < TAPS; ++tap)
                out[(i64)tap * COLUMNS * INNER] = channel < GIVEN_OUT ? w[tap] : bf16{0};
            continue;
        }
        for (int corner = 0; corner < 4; ++corner) {
            float sums[4] = {0, 0, 0, 0};
            for (int r = 0; r < 3; ++r)
                for (int s = 0; s < 3; ++s) {
                    const int y = (corner / 2 + r + 1) / 2 - corner / 2, x = (corner % 2 + s + 1) / 2 - corner % 2;
                    sums[y * 2 + x] += widen(w[r * 3 + s]);
                }
            for (int tap = 0; tap < 4; ++tap) store(out + (i64)(corner * 4 + tap) * COLUMNS * INNER, sums[tap]);
        }
    }
}
