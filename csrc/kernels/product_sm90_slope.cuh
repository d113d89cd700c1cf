// Slope codes (device/slope_code.cuh) between product_sm90's accumulators and tiles in shared
// memory of [tokens][64 features], a byte each, in the 64-byte swizzle.
//
// ldmatrix and stmatrix see 16-bit elements, two neighbouring features of one token. With .trans
// lane l has, in register j, tokens 8 j + 2 (l % 4) + {0, 1} (low half, high half) of features
// 2 (l / 4) + {0, 1} of its warp's 16. Its accumulators belong to the same tokens, but to features
// l / 4 and l / 4 + 8: codes change lanes, among those of equal l % 4.
#pragma once

#include "device/ldmatrix.cuh"
#include "device/slope_code.cuh"

namespace pixelfly {

namespace groups {

// Address of the 16 bytes that this lane serves in the i-th stmatrix/ldmatrix.x4.trans of a warp's
// 16 features: one for 32 tokens.
__device__ inline uint32_t code_address(uint32_t tile, int i) {
  const int token = i * 32 + threadIdx.x % 32, chunk = threadIdx.x / 32 % 4;
  return tile + token * 64 + ((chunk ^ (token >> 1 & 3)) << 4);
}

// The codes of 8 tokens as the accumulators lie: feature l / 4 in bytes 0 and 1, feature l / 4 + 8
// in bytes 2 and 3.
__device__ __forceinline__ uint32_t join_codes(const uint32_t (&pairs)[2]) {
  return __byte_perm(pairs[0], pairs[1], 0x6420);
}

// From there to stmatrix's order.
template <int kWords>
__device__ __forceinline__ void exchange_codes(uint32_t (&codes)[kWords][4]) {
  const int row = threadIdx.x % 32 / 4;
  const int even = row % 4 * 8 + threadIdx.x % 4;  // the lane that has feature 2 row
  const uint32_t selector = row < 4 ? 0x5140 : 0x7362;
#pragma unroll
  for (int i = 0; i < kWords * 4; ++i) {
    uint32_t& word = codes[i / 4][i % 4];
    const uint32_t low = __shfl_sync(0xffffffffu, word, even);
    const uint32_t high = __shfl_sync(0xffffffffu, word, even + 4);
    word = __byte_perm(low, high, selector);
  }
}

// Multiplies the accumulators of 64 tokens by the slopes of codes as ldmatrix gave them.
template <bool kNan>
__device__ __forceinline__ void multiply_by_codes(float* acc, const uint32_t (&codes)[2][4]) {
  const int row = threadIdx.x % 32 / 4;
  const int lane =
      row / 2 * 4 + threadIdx.x % 4;  // has feature `row`; 16 lanes on: feature row + 8
  const uint32_t first = device::slope_selector(row % 2),
                 second = device::slope_selector(row % 2 + 2);
  const uint32_t selectors[2] = {first, second};  // of the two tokens
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = codes[i / 4][i % 4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t given = __shfl_sync(0xffffffffu, word, lane + h * 16);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = acc[i * 4 + h * 2 + e];
        x *= device::decode_slope(given, selectors[e]);
        if (kNan && (given >> (row % 2 + e * 2) * 8 & 0xff) == device::kCodeOfNan) x = NAN;
      }
    }
  }
}
__device__ __forceinline__ void combine_codes(float* acc, const uint32_t (&codes)[2][4]) {
  uint32_t flags = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) flags |= device::nan_flags(codes[i / 4][i % 4]);
  // The lane that sees a NaN is not the one that it belongs to.
  if (__ballot_sync(0xffffffffu, flags & device::kNanFlags) == 0) {
    multiply_by_codes<false>(acc, codes);
  } else {
    multiply_by_codes<true>(acc, codes);
  }
}

}  // namespace groups

}  // namespace pixelfly
