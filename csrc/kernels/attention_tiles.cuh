// A head's rows in shared memory, and a warp's fragments of them for mma.sync.
//
// A matrix [rows][64] lies as TMA leaves it: rows of 128 bytes, in the 128-byte swizzle, so that
// every eight rows of a fragment come from different banks. Fragments: device/mma.cuh.
#pragma once

#include <cuda_runtime.h>

#include "device/convert.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"

namespace pixelfly::attention {

constexpr int kRows = 16;  // of a tile
constexpr int kRowBytes = 128;
constexpr int kTileBytes = kRows * kRowBytes;

// Where a lane's row of ldmatrix lies in a tile, for the first 16 features. The next 16: ^ 32.
//   rows first: matrices (rows 0-7, features 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15). A
//     operands of these rows; with .trans B operands whose k are the rows.
//   features first: the second and third change places. B operands whose n are the rows.
struct Lanes {
  uint32_t rows_first, features_first;

  __device__ Lanes() {
    const uint32_t lane = threadIdx.x % 32, swizzle = lane % 8;
    rows_first = lane % 16 * kRowBytes + ((lane / 16 ^ swizzle) << 4);
    features_first = (lane % 8 + lane / 16 * 8) * kRowBytes + ((lane / 8 % 2 ^ swizzle) << 4);
  }
};

// The j-th 16 features of a lane's row.
__device__ __forceinline__ uint32_t features(uint32_t row, int j) { return row ^ (j << 5); }

// kTiles tiles of rows as A operands, 16 features each. The last may not be there (`tiles`, of the
// whole matrix): the one before it stands in, and nobody uses the results.
template <int kTiles>
struct RowFragments {
  uint32_t a[kTiles][4][4];

  __device__ __forceinline__ void load(uint32_t matrix, int first, int tiles, const Lanes& lanes) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const uint32_t tile = matrix + min(first + m, tiles - 1) * kTileBytes;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        device::ldmatrix_x4(a[m][j], features(tile + lanes.rows_first, j));
      }
    }
  }
};

// sums [rows][16 rows of the tile] += rows · tileᵀ.
template <typename T, int kTiles>
__device__ __forceinline__ void add_scores(float (&sums)[kTiles][2][4],
                                           const RowFragments<kTiles>& rows, uint32_t tile,
                                           const Lanes& lanes) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t b[4];
    device::ldmatrix_x4(b, features(tile + lanes.features_first, j));
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      device::mma_m16n8k16<T>(sums[m][0], rows.a[m][j], b[0], b[1]);
      device::mma_m16n8k16<T>(sums[m][1], rows.a[m][j], b[2], b[3]);
    }
  }
}

// sums [kTiles * 16][64] += weights [kTiles * 16][16 rows of the tile] · tile.
template <typename T, int kTiles>
__device__ __forceinline__ void add_rows(float (&sums)[kTiles][8][4],
                                         const uint32_t (&weights)[kTiles][4], uint32_t tile,
                                         const Lanes& lanes) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t b[4];
    device::ldmatrix_x4_trans(b, features(tile + lanes.rows_first, j));
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      device::mma_m16n8k16<T>(sums[m][2 * j], weights[m], b[0], b[1]);
      device::mma_m16n8k16<T>(sums[m][2 * j + 1], weights[m], b[2], b[3]);
    }
  }
}

// Sums [16][16] as an A operand.
template <typename T>
__device__ __forceinline__ void as_weights(uint32_t (&weights)[4], const float (&sums)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      weights[n * 2 + h] = device::pack2<T>(sums[n][2 * h], sums[n][2 * h + 1]);
    }
  }
}

// Writes the first `rows` of 16 rows of sums, times the lane's two factors. Neighbouring lanes
// exchange pairs, so that a row leaves in whole sectors of 32 bytes.
template <typename T>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, int rows,
                                           const float (&sums)[8][4], float factor,
                                           float factor_below) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const bool odd = quad % 2 == 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    const float f = h == 0 ? factor : factor_below;
    T* at = to + row * stride + quad / 2 * 4 + (odd ? 8 : 0);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float *even_sums = sums[2 * j] + 2 * h, *odd_sums = sums[2 * j + 1] + 2 * h;
      const uint32_t first = device::pack2<T>(even_sums[0] * f, even_sums[1] * f);
      const uint32_t second = device::pack2<T>(odd_sums[0] * f, odd_sums[1] * f);
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      const uint2 pairs{odd ? got : first, odd ? second : got};
      if (row < rows) *reinterpret_cast<uint2*>(at + j * 16) = pairs;
    }
  }
}

}  // namespace pixelfly::attention
