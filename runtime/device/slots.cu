// out[c, slot] += weight * part[c, k] for every channel c. Multiplies and adds apart, as numpy does: CPU and GPU agree
// to the last bit.
extern "C" __global__ void blend(float* out, const float* part, i64 size, i64 inner, i64 out_pitch, i64 part_pitch,
                                 float weight) {
    EACH(i, size) {
        i64 c = i / inner, p = i % inner;
        float* to = out + c * out_pitch + p;
        *to = __fadd_rn(*to, __fmul_rn(part[c * part_pitch + p], weight));
    }
}
