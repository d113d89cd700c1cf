// Tensor maps of the emulator, with the driver's conditions.
#include "launch/tensor_map.h"

namespace pixelfly {

Status encode_tile_map(CUtensorMap* out, DType dtype, const void* data, int64_t rows, int64_t cols,
                       int64_t stride, int box_rows, int box_cols) {
  const int size = static_cast<int>(size_of(dtype));
  const int64_t stride_bytes = stride * size;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
  const bool sizes = rows > 0 && cols > 0;
  const bool box = box_rows <= 256 && box_cols * size <= 128 && box_cols * size % 16 == 0;
  if (!aligned || !sizes || !box) return Status::cuda("encode_tile_map: the driver would refuse");
  *out = {const_cast<uint8_t*>(static_cast<const uint8_t*>(data)),
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
