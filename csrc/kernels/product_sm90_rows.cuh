// product_sm90's tiles between registers and shared memory.
#pragma once

#include "device/convert.cuh"
#include "device/ldmatrix.cuh"
#include "kernels/product_sm90_columns.cuh"

namespace pixelfly {

namespace groups {

// Address in a swizzled [tokens][64 features] tile of the 8x8 matrix row that this lane serves in
// the j-th stmatrix/ldmatrix.x4.trans of a warp's 16 features x 64 tokens.
__device__ inline uint32_t fragment_address(uint32_t tile, int j) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8;
  const int token = j * 16 + (matrix / 2) * 8 + lane % 8;
  const int chunk = warp * 2 + matrix % 2;
  return tile + token * 128 + ((chunk ^ (token & 7)) << 4);
}

// Applies f(accumulator, aux) with 64 tokens of an aux tile in shared memory.
template <typename T, bool kColumns, typename F>
__device__ __forceinline__ void combine(float* acc, uint32_t tile, F f) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t r[4];
    if constexpr (kColumns) {
      device::ldmatrix_x4(r, columns::fragment_address(tile, j));
    } else {
      device::ldmatrix_x4_trans(r, fragment_address(tile, j));
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const float2 a = device::unpack2<T>(r[h]);
      acc[j * 8 + h * 2] = f(acc[j * 8 + h * 2], a.x);
      acc[j * 8 + h * 2 + 1] = f(acc[j * 8 + h * 2 + 1], a.y);
    }
  }
}

}  // namespace groups

}  // namespace pixelfly
