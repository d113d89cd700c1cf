// product_sm90's tiles where tokens are columns, [64 features][64 tokens], and their slope codes.
//
// A lane's accumulators are pairs of tokens of one feature, which is what ldmatrix and stmatrix
// move without .trans: nothing changes lanes. Codes neither, as their order in memory is the
// accumulators': of 16 tokens, lane q of 4 has tokens 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q, and their
// codes lie side by side. Only the product that multiplies by the slopes reads them.
#pragma once

#include "device/ldmatrix.cuh"
#include "device/slope_code.cuh"

namespace pixelfly {

namespace groups::columns {

constexpr int kCodeBytes = 64 * 64;

// Address in a swizzled [64 features][64 tokens] tile of the 8x8 matrix row that this lane serves
// in the j-th stmatrix/ldmatrix.x4 of a warp's 16 features x 64 tokens.
__device__ inline uint32_t fragment_address(uint32_t tile, int j) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8;
  const int feature = warp * 16 + matrix % 2 * 8 + lane % 8;
  const int chunk = j * 2 + matrix / 2;
  return tile + feature * 128 + ((chunk ^ (feature & 7)) << 4);
}

// The same of codes, in the 64-byte swizzle, for the i-th of two: 32 tokens each.
__device__ inline uint32_t code_address(uint32_t tile, int i) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8;
  const int feature = warp * 16 + matrix % 2 * 8 + lane % 8;
  const int chunk = i * 2 + matrix / 2;
  return tile + feature * 64 + ((chunk ^ (feature >> 1 & 3)) << 4);
}

// Adds the codes of the i-th 8 tokens of 64, as the accumulators lie: two of this lane's feature,
// two of that 8 below. Register 2 k + h of the words: the k-th 16 tokens, feature + 8 h.
__device__ __forceinline__ void add_codes(uint32_t (&words)[2][4], int i,
                                          const uint32_t (&pairs)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t& word = words[i / 4][i / 2 % 2 * 2 + h];
    word = i % 2 == 0 ? pairs[h] : __byte_perm(word, pairs[h], 0x6420);
  }
}

// Multiplies the accumulators of 64 tokens by the slopes of such words.
__device__ __forceinline__ void combine_codes(float* acc, const uint32_t (&words)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t word = words[i / 4][i / 2 % 2 * 2 + h];
      const uint32_t nan = device::nan_flags(word);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int byte = i % 2 * 2 + e;
        float& x = acc[i * 4 + h * 2 + e];
        x *= device::decode_slope(word, device::slope_selector(byte));
        if (nan >> byte * 8 & 0x80) x = NAN;
      }
    }
  }
}

}  // namespace groups::columns

}  // namespace pixelfly
