// Whether rows of a matrix can be moved as 16-byte vectors.
#pragma once

#include <cstdint>

#include "pixelfly/dtype.h"

namespace pixelfly {

inline bool aligned_rows(const void* data, int64_t stride, DType dtype) {
  return data == nullptr ||
         (reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0);
}

}  // namespace pixelfly
