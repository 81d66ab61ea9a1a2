// out [rows, width], in 16 bytes, of pieces [pieces, rows, piece_width], which lie beside each other in a row. Channels
// behind `width` are dropped. Of every `share` rows those from `filled` on are padding, and become 0. A block has a row.
extern "C" __global__ void beside(uint4* out, const uint4* pieces, i64 rows, i64 width, i64 piece_width, i64 share,
                                  i64 filled) {
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const bool padding = row % share >= filled;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            const u32 piece = i / (u32)piece_width, at = i % (u32)piece_width;
            out[row * width + i] = padding ? make_uint4(0, 0, 0, 0) : pieces[(piece * rows + row) * piece_width + at];
        }
    }
}
