// product_sm90's weight tiles in registers, as wgmma's A.
#pragma once

#include "device/ldmatrix.cuh"
#include "device/wgmma.cuh"
#include "kernels/product_sm90_columns.cuh"
#include "kernels/product_sm90_rows.cuh"
#include "kernels/product_sm90_work.cuh"

namespace pixelfly {

namespace groups {

// Of an x tile: 128 tokens are wgmma's N.
template <bool kColumns>
__device__ __forceinline__ uint64_t x_descriptor(uint32_t tile) {
  return kColumns ? device::descriptor_mn_major(tile, kGroupTileBytes)
                  : device::descriptor_k_major(tile);
}

// A tile of 64x64.
template <typename T, bool kTransposed, bool kColumns>
struct WeightFragments {
  uint32_t a[4][4];  // of 16 contracted features each

  // From shared memory: [features out][features in] in the 128-byte swizzle.
  __device__ __forceinline__ void load(uint32_t tile) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kTransposed) {
        device::ldmatrix_x4_trans(a[k], fragment_address(tile, k));
      } else {
        device::ldmatrix_x4(a[k], columns::fragment_address(tile, k));
      }
    }
  }

  // acc += this tile · x tile, asynchronously.
  __device__ __forceinline__ void multiply(float (&acc)[64], uint32_t x) const {
    const uint64_t b = x_descriptor<kColumns>(x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      device::wgmma_registers<T, kColumns>(acc, a[k], b + k * (kColumns ? 128 : 2), 1);
    }
  }
};

}  // namespace groups

}  // namespace pixelfly
