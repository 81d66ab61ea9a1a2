// Decoded frames, uint8 RGB [height, width, 3], to the inputs [3, height, width] of two networks.
//
// A thread makes one pixel from four pixels of the frame. The host's tables (resampling_tables.py) name them and their
// weights for every column and every row. Offsets into a frame have 64 bits. Macros: MEAN and STD, three numbers each.

struct WholeTap { int first, second, first_weight, second_weight; };  // weights in 1/2048
struct Tap { int first, second; float first_weight, second_weight; };

__constant__ float mean_of_channel[3] = {MEAN};
__constant__ float std_of_channel[3] = {STD};

// The whole frame in 0..1, equal to OpenCV's INTER_LINEAR of uint8 to the last bit.
template <typename T>
__device__ void stretch(const u8* frame, i64 pitch, const WholeTap* across, const WholeTap* down, T* out,
                        int width, int height) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
    if (x >= width) return;
    const WholeTap h = across[x], v = down[y];
    const u8* above = frame + v.first * pitch;
    const u8* below = frame + v.second * pitch;
    const i64 left = 3 * (i64)h.first, right = 3 * (i64)h.second;
    const i64 plane = (i64)width * height, place = (i64)y * width + x;
    for (int c = 0; c < 3; ++c) {
        const int upper = above[left + c] * h.first_weight + above[right + c] * h.second_weight;
        const int lower = below[left + c] * h.first_weight + below[right + c] * h.second_weight;
        const int value = ((v.first_weight * (upper >> 4) >> 16) + (v.second_weight * (lower >> 4) >> 16) + 2) >> 2;
        store(out + c * plane + place, value / 255.0f);
    }
}

// A crop, normalised. Multiplies and adds apart, in the host's order: equal to the host's to the last bit.
template <typename T>
__device__ void crop(const u8* frame, i64 pitch, const Tap* across, const Tap* down, T* out,
                     int width, int height, int bgr) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
    if (x >= width) return;
    const Tap h = across[x], v = down[y];
    const u8* above = frame + v.first * pitch;
    const u8* below = frame + v.second * pitch;
    const i64 left = 3 * (i64)h.first, right = 3 * (i64)h.second;
    const i64 plane = (i64)width * height, place = (i64)y * width + x;
    for (int c = 0; c < 3; ++c) {
        const int channel = bgr ? 2 - c : c;
        float sum = __fmul_rn(above[left + channel], __fmul_rn(v.first_weight, h.first_weight));
        sum = __fadd_rn(sum, __fmul_rn(above[right + channel], __fmul_rn(v.first_weight, h.second_weight)));
        sum = __fadd_rn(sum, __fmul_rn(below[left + channel], __fmul_rn(v.second_weight, h.first_weight)));
        sum = __fadd_rn(sum, __fmul_rn(below[right + channel], __fmul_rn(v.second_weight, h.second_weight)));
        const float centred = __fsub_rn(__fdiv_rn(sum, 255.0f), mean_of_channel[c]);
        store(out + c * plane + place, __fdiv_rn(centred, std_of_channel[c]));
    }
}

#define FOR(type, T)                                                                                             \
    extern "C" __global__ void stretch_##type(const u8* frame, i64 pitch, const WholeTap* across,                \
                                              const WholeTap* down, T* out, int width, int height) {             \
        stretch(frame, pitch, across, down, out, width, height);                                                 \
    }                                                                                                            \
    extern "C" __global__ void crop_##type(const u8* frame, i64 pitch, const Tap* across, const Tap* down,       \
                                           T* out, int width, int height, int bgr) {                             \
        crop(frame, pitch, across, down, out, width, height, bgr);                                               \
    }
FOR(float32, float)
FOR(float16, fp16)
#undef FOR
