// Whether rows of a matrix can be moved as 16-byte vectors.
#pragma once

#include <cstdint>

#include "pixelfly/params.h"

namespace pixelfly {

inline bool aligned_rows(const void* data, int64_t stride, DType dtype) {
  return data == nullptr ||
         (reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0);
}

// Whether the others of an operand's three matrices can, if there are any, and each is made of
// whole tiles of the Hopper kernels. `features`: of all three.
inline bool aligned_thirds(const OtherThirds& others, int32_t features, DType dtype) {
  return !others.given() || (features % (3 * kGroupTile) == 0 &&
                             aligned_rows(others.data[0], others.stride[0], dtype) &&
                             aligned_rows(others.data[1], others.stride[1], dtype));
}

}  // namespace pixelfly
