// Changes of LoRAs added to float32 weights [rows, inner]. numbers.cuh stands in front.

constexpr int TILE = 64;  // rows and columns of a block of 256 threads, 4x4 numbers each at a distance of 16
constexpr int DEPTH = 16;  // ranks at a time

// values += scale * up @ down; up [rows, rank], down [rank, inner]. Each sum runs over the ranks in their order, in
// float32.
template <class In>
__device__ void add_product(const In* up, const In* down, float scale, float* values, i64 rows, i64 inner, i64 rank) {
    __shared__ float ups[DEPTH][TILE + 1];  // so that neighbouring ranks lie in different banks
    __shared__ float downs[DEPTH][TILE];
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const i64 across = (inner + TILE - 1) / TILE, tiles = across * ((rows + TILE - 1) / TILE);
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 row = tile / across * TILE, column = tile % across * TILE;
        float sums[4][4] = {};
        for (i64 first = 0; first < rank; first += DEPTH) {
            for (int i = threadIdx.x; i < DEPTH * TILE; i += blockDim.x) {
                const int depth = i % DEPTH, across_up = i / DEPTH;  // neighbours in memory to neighbours in threads
                const bool inside = first + depth < rank && row + across_up < rows;
                ups[depth][across_up] = inside ? load(up + (row + across_up) * rank + first + depth) : 0.0f;
                const int below = i / TILE, at = i % TILE;
                const bool within = first + below < rank && column + at < inner;
                downs[below][at] = within ? load(down + (first + below) * inner + column + at) : 0.0f;
            }
            __syncthreads();
            for (int depth = 0; depth < DEPTH; depth++)
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++)
                        sums[i][j] = fmaf(ups[depth][y + 16 * i], downs[depth][x + 16 * j], sums[i][j]);
            __syncthreads();
        }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                if (row + y + 16 * i < rows && column + x + 16 * j < inner) {
                    float* value = values + (row + y + 16 * i) * inner + column + x + 16 * j;
                    *value = fmaf(scale, sums[i][j], *value);
                }
    }
}

template <class In>
__device__ void add(const In* change, float scale, float* values, i64 n) {
    EACH(i, n) values[i] = fmaf(scale, load(change + i), values[i]);
}

#define CHANGES(name, In) \
    extern "C" __global__ void add_product_##name( \
        const In* up, const In* down, float scale, float* values, i64 rows, i64 inner, i64 rank) { \
        add_product(up, down, scale, values, rows, inner, rank); \
    } \
    extern "C" __global__ void add_##name(const In* change, float scale, float* values, i64 n) { \
        add(change, scale, values, n); \
    }

CHANGES(float32, float)
CHANGES(float16, fp16)
CHANGES(bfloat16, bf16)

// E4M3 with a scale per row, its largest magnitude over 448. convert.cu rounds to bf16 first, which takes 7 % of a delta
// of 0.3 % from weights that lie in bf16. One block of 256 threads takes a row.
extern "C" __global__ void quantise_rows(const float* values, e4m3* out, float* scales, i64 rows, i64 inner) {
    __shared__ float largest[256];
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const i64 first = row * inner;
        float most = 0;
        for (i64 i = threadIdx.x; i < inner; i += blockDim.x) most = fmaxf(most, fabsf(values[first + i]));
        const float scale = fmaxf(largest_of_block(most, largest) / E4M3_MAX, 1e-12f);
        if (threadIdx.x == 0) scales[row] = scale;
        for (i64 i = threadIdx.x; i < inner; i += blockDim.x) store(out + first + i, values[first + i] / scale);
        __syncthreads();  // `largest` is written again for the next row
    }
}
