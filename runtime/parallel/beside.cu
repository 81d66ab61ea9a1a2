// out [rows, whole], in 16 bytes, from pieces [count, rows, width]: piece i goes to column first + i·step of every row.
// Channels behind `whole` are dropped. In every `share` rows those from `filled` on are padding, and become 0. A block
// has a row.
extern "C" __global__ void beside(uint4* out, const uint4* pieces, i64 rows, i64 share, i64 filled, i64 count, i64 width,
                                  i64 step, i64 first, i64 whole) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const bool padding = row % share >= filled;
        for (u32 i = threadIdx.x; i < count * width; i += blockDim.x) {
            const u32 piece = i / (u32)width, at = i % (u32)width;
            const i64 column = first + piece * step + at;
            if (column >= whole) continue;
            out[row * whole + column] = padding ? make_uint4(0, 0, 0, 0) : pieces[(piece * rows + row) * width + at];
        }
    }
}
