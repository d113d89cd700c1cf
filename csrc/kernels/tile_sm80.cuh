// Shared by the sm_80 kernels: a masked 2-D tile loader and warp-level products out of padded
// shared-memory tiles.
//
// A tile is [rows][kCols] elements with every row padded by kPad bytes, which makes ldmatrix
// (16-bit types) and scalar fragment loads (fp32) free of bank conflicts or nearly so.
#pragma once

#include <cuda_runtime.h>

#include "device/convert.cuh"
#include "device/cp_async.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"
#include "device/shared_memory.cuh"

namespace pixelfly::sm80 {

template <typename T>
constexpr int kPad = sizeof(T) == 4 ? 32 : 16;

template <typename T, int kRows, int kCols>
struct Tile {
  static constexpr int kRowBytes = kCols * sizeof(T) + kPad<T>;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kChunks = kCols / kVec;  // 16-byte chunks in a row
};

// Loads rows [0, valid_rows) x columns [0, valid_cols) of a row-major matrix into a tile, zeros
// elsewhere. `vectors` says that rows are 16-byte aligned and valid_cols is a multiple of the
// vector: then copies are asynchronous; otherwise elements are loaded one by one (rare shapes).
template <typename T, int kRows, int kCols, int kThreads>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* source, int64_t stride,
                                          int valid_rows, int valid_cols, bool vectors) {
  using Shape = Tile<T, kRows, kCols>;
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * Shape::kChunks; i += kThreads) {
    const int row = i / Shape::kChunks, col = i % Shape::kChunks * Shape::kVec;
    const uint32_t to = tile + row * Shape::kRowBytes + col * static_cast<int>(sizeof(T));
    const T* from = source + row * stride + col;
    if (vectors) {
      const bool valid = row < valid_rows && col < valid_cols;
      device::cp_async_16(to, valid ? from : source, valid);
    } else {
      device::Vec16<T> v;
#pragma unroll
      for (int e = 0; e < Shape::kVec; ++e) {
        const bool valid = row < valid_rows && col + e < valid_cols;
        v.set(e, valid ? device::to_float(from[e]) : 0.f);
      }
      device::store_shared(to, v.raw);
    }
  }
}

// Operand orders: how a tile stores the matrix that multiplies over k.
//   kDirect: rows are m (or n), k is contiguous.   kAcross: rows are k, m (or n) is contiguous.
enum class Order { kDirect, kAcross };

// acc[m16 tiles][n8 tiles] += A[m0.., k0..k0+kDepth) * B[n0.., same k), for one warp.
template <typename T, int kMTiles, int kNTiles, int kDepth, Order kA, Order kB, int kRowBytesA,
          int kRowBytesB>
struct WarpProduct {
  static __device__ __forceinline__ uint32_t at(uint32_t base, int row, int col, int row_bytes) {
    return base + row * row_bytes + col * static_cast<int>(sizeof(T));
  }

  static __device__ __forceinline__ void run(float (&acc)[kMTiles][kNTiles][4], uint32_t a,
                                             uint32_t b, int m0, int n0, int k0, bool allow_tf32) {
    if constexpr (sizeof(T) == 2) {
      run16(acc, a, b, m0, n0, k0);
    } else {
      run32(acc, a, b, m0, n0, k0, allow_tf32);
    }
  }

  static __device__ __forceinline__ void run16(float (&acc)[kMTiles][kNTiles][4], uint32_t a,
                                               uint32_t b, int m0, int n0, int k0) {
    static_assert(kNTiles % 2 == 0, "ldmatrix.x4 serves two n8 tiles");
    const int lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t af[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        // Matrices in register order: (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8).
        const int mm = m0 + m * 16 + matrix % 2 * 8, kk = k0 + k + matrix / 2 * 8;
        if constexpr (kA == Order::kDirect) {
          device::ldmatrix_x4(af[m], at(a, mm + row, kk, kRowBytesA));
        } else {
          device::ldmatrix_x4_trans(af[m], at(a, kk + row, mm, kRowBytesA));
        }
      }
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        // Matrices: (n, k), (n, k + 8), (n + 8, k), (n + 8, k + 8).
        const int nn = n0 + n * 8 + matrix / 2 * 8, kk = k0 + k + matrix % 2 * 8;
        uint32_t bf[4];
        if constexpr (kB == Order::kDirect) {
          device::ldmatrix_x4(bf, at(b, nn + row, kk, kRowBytesB));
        } else {
          device::ldmatrix_x4_trans(bf, at(b, kk + row, nn, kRowBytesB));
        }
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          device::mma_m16n8k16<T>(acc[m][n], af[m], bf[0], bf[1]);
          device::mma_m16n8k16<T>(acc[m][n + 1], af[m], bf[2], bf[3]);
        }
      }
    }
  }

  // fp32 storage: tf32 tensor cores if one pass of tf32 is allowed, else plain fp32 arithmetic
  // (three tf32 passes were tried: their error is several times that of fp32).
  static __device__ __forceinline__ void run32(float (&acc)[kMTiles][kNTiles][4], uint32_t a,
                                               uint32_t b, int m0, int n0, int k0,
                                               bool allow_tf32) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto load_a = [&](int m, int k) {
      return device::load_shared_float(kA == Order::kDirect ? at(a, m, k, kRowBytesA)
                                                            : at(a, k, m, kRowBytesA));
    };
    auto load_b = [&](int n, int k) {
      return device::load_shared_float(kB == Order::kDirect ? at(b, n, k, kRowBytesB)
                                                            : at(b, k, n, kRowBytesB));
    };
    if (!allow_tf32) {
      // Each stage is summed on its own and then added: shorter chains of additions keep the error
      // within that of cuBLAS. One pair of n8 tiles at a time, for the registers.
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        float sum[kMTiles][2][4] = {};
#pragma unroll 4
        for (int k = k0; k < k0 + kDepth; ++k) {
          float cols[2][2];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            cols[i / 2][i % 2] = load_b(n0 + (n + i / 2) * 8 + 2 * t + i % 2, k);
          }
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            const float rows[2] = {load_a(m0 + m * 16 + g, k), load_a(m0 + m * 16 + g + 8, k)};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              sum[m][i / 4][i % 4] =
                  fmaf(rows[i % 4 / 2], cols[i / 4][i % 2], sum[m][i / 4][i % 4]);
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[m][n + i / 4][i % 4] += sum[m][i / 4][i % 4];
        }
      }
      return;
    }
#pragma unroll 2
    for (int k = k0; k < k0 + kDepth; k += 8) {
      uint32_t af[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        const int mm = m0 + m * 16 + g;
        af[m][0] = device::to_tf32(load_a(mm, k + t));
        af[m][1] = device::to_tf32(load_a(mm + 8, k + t));
        af[m][2] = device::to_tf32(load_a(mm, k + t + 4));
        af[m][3] = device::to_tf32(load_a(mm + 8, k + t + 4));
      }
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        const int nn = n0 + n * 8 + g;
        const uint32_t b0 = device::to_tf32(load_b(nn, k + t));
        const uint32_t b1 = device::to_tf32(load_b(nn, k + t + 4));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) device::mma_m16n8k8_tf32(acc[m][n], af[m], b0, b1);
      }
    }
  }
};

}  // namespace pixelfly::sm80
