// Tensor maps for TMA: row-major matrices in the 128-byte swizzle (64-byte where a box row has 64
// bytes).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "pixelfly/dtype.h"
#include "pixelfly/status.h"

namespace pixelfly {

// A [rows, cols] matrix with `stride` elements between rows, moved in boxes of box_rows x box_cols.
// A box row is at most 128 bytes: 128 8-bit, 64 16-bit or 32 fp32 elements. Data must be 16-byte
// aligned and the stride a multiple of 16 bytes.
Status encode_tile_map(CUtensorMap* out, DType dtype, const void* data, int64_t rows, int64_t cols,
                       int64_t stride, int box_rows = 64, int box_cols = 64);

// `planes` such matrices, one behind the other; a box lies in one plane.
Status encode_plane_map(CUtensorMap* out, DType dtype, const void* data, int64_t planes,
                        int64_t rows, int64_t cols, int box_rows = 64, int box_cols = 64);

}  // namespace pixelfly
