// Tensor maps of the emulator, with the driver's conditions.
#include "launch/tensor_map.h"

namespace pixelfly {

Status encode_tile_map(CUtensorMap* out, DType dtype, const void* data, int64_t rows, int64_t cols,
                       int64_t stride, int box_rows, int box_cols) {
  const Status status = encode_plane_map(out, dtype, data, 1, rows, cols, box_rows, box_cols);
  out->stride_bytes = stride * static_cast<int64_t>(size_of(dtype));
  return status.ok() && out->stride_bytes % 16 != 0
             ? Status::cuda("encode_tile_map: the driver would refuse")
             : status;
}

Status encode_plane_map(CUtensorMap* out, DType dtype, const void* data, int64_t planes,
                        int64_t rows, int64_t cols, int box_rows, int box_cols) {
  const int size = static_cast<int>(size_of(dtype));
  const int64_t stride_bytes = cols * size;
  const bool aligned =
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && (planes == 1 || stride_bytes % 16 == 0);
  const bool sizes = planes > 0 && rows > 0 && cols > 0;
  const bool box = box_rows <= 256 && box_cols * size <= 128 && box_cols * size % 16 == 0;
  if (!aligned || !sizes || !box) return Status::cuda("encode_plane_map: the driver would refuse");
  *out = {const_cast<uint8_t*>(static_cast<const uint8_t*>(data)),
          planes,
          rows,
          cols,
          stride_bytes,
          box_rows,
          box_cols,
          size,
          box_cols * size == 64 ? 64 : 128};
  return Status::success();
}

}  // namespace pixelfly
