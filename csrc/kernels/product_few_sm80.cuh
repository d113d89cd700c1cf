// y = act(x · Bᵀ + t · uᵀ + bias) + residual for few tokens (decoding): bound by reading each
// weight once, on mma.sync, for every GPU from sm_80 on. Also t = x · vᵀ: a product without blocks.
//
// A thread block makes 16 kRows features of all tokens: 32 where tokens are many, which halves what
// is read of x. Its warps take chunks of 32 contraction features in turn: weights are mma's A (M =
// 16 features), up to 8 kTiles tokens are N. Nothing is staged: the order of k within a chunk is
// free as long as A and B agree, so each lane loads 16 contiguous bytes of its row and column,
// which are the fragments of two k16 products. The warps' partial sums meet in shared memory, in
// order.
//
//   shared memory: float [warps][16 kRows features][8 kTiles tokens + 1]
#pragma once

#include "device/convert.cuh"
#include "device/epilogue_math.cuh"
#include "device/mma.cuh"
#include "device/shared_memory.cuh"
#include "device/slope_code.cuh"
#include "pixelfly/params.h"

namespace pixelfly::sm80 {

constexpr int kFewFeatures = 16;  // of an mma
constexpr int kFewDepth = 32;     // contraction features of a chunk
constexpr int kFewMaxTiles = 8;   // of 8 tokens

// More rows need more registers, and sums that fit into the 99 KB of sm_86 and sm_89.
constexpr int few_max_warps(int rows) { return rows == 1 ? 16 : 8; }

struct FewArgs {
  ProductParams p;
  const int32_t* row_ptr;  // [block rows + 1]; null: no blocks
  const int32_t* col_idx;  // [nnz]
  int32_t block_size;      // 32, 64 or 128
  int32_t rank;
};

// 8 contiguous elements of a row, or zeros.
__device__ __forceinline__ uint4 load_vector(const void* row, bool valid) {
  return valid ? __ldg(static_cast<const uint4*>(row)) : uint4{0, 0, 0, 0};
}

// One chunk: a lane's weights of rows g + 8 h, and its 8 values of each token tile.
template <int kRows, int kTiles>
struct FewChunk {
  uint4 weights[2 * kRows];
  uint4 x[kTiles];
};

template <typename T, int kRows, int kTiles>
__device__ __forceinline__ void load_chunk(FewChunk<kRows, kTiles>& c, const FewArgs& args,
                                           int chunk, int block_chunks, int first_entry,
                                           int feature) {
  const ProductParams& p = args.p;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T* source;  // row `token` of x or t, at this lane's k
  int64_t stride;
  bool inside;
  if (chunk < block_chunks) {
    const int b = args.block_size, parts = b / kFewDepth;
    const int entry = first_entry + chunk / parts, k = chunk % parts * kFewDepth + t * 8;
    const T* block = static_cast<const T*>(p.blocks) + static_cast<int64_t>(entry) * b * b;
#pragma unroll
    for (int h = 0; h < 2 * kRows; ++h) {
      c.weights[h] = load_vector(block + (feature % b + g + h * 8) * b + k, true);
    }
    const int col = args.col_idx[entry] * b + k;
    source = static_cast<const T*>(p.x) + col;
    stride = p.x_stride;
    inside = col < p.in_features;
  } else {
    const int k = (chunk - block_chunks) * kFewDepth + t * 8;
    inside = k < args.rank;
#pragma unroll
    for (int h = 0; h < 2 * kRows; ++h) {
      const int row = feature + g + h * 8;
      const T* factor = static_cast<const T*>(p.factor) + row * p.factor_stride + k;
      c.weights[h] = load_vector(factor, inside && row < p.out_features);
    }
    source = static_cast<const T*>(p.t) + k;
    stride = p.t_stride;
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t token = i * 8 + g;
    c.x[i] = load_vector(source + token * stride, inside && token < p.tokens);
  }
}

template <typename T, int kRows, int kTiles>
__global__ void __launch_bounds__(few_max_warps(kRows) * 32)
    product_few_sm80(const __grid_constant__ FewArgs args) {
  constexpr int kAhead = kTiles <= 2 ? 4 : 2;  // chunks in flight
  constexpr int kFeatures = kRows * kFewFeatures;
  constexpr int kStride = kTiles * 8 + 1;  // of a feature's sums
  const ProductParams& p = args.p;
  const int feature = blockIdx.x * kFeatures;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int first = 0, last = 0;
  if (args.row_ptr != nullptr) {
    first = args.row_ptr[feature / args.block_size];
    last = args.row_ptr[feature / args.block_size + 1];
  }
  const int block_chunks = (last - first) * (args.block_size / kFewDepth);
  const int chunks = block_chunks + (args.rank + kFewDepth - 1) / kFewDepth;

  float acc[kRows][kTiles][4] = {};
  for (int begin = warp; begin < chunks; begin += warps * kAhead) {
    FewChunk<kRows, kTiles> ahead[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int chunk = begin + a * warps;
      if (chunk < chunks) {
        load_chunk<T>(ahead[a], args, chunk, block_chunks, first, feature);
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (begin + a * warps >= chunks) break;
      const FewChunk<kRows, kTiles>& c = ahead[a];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint4 top = c.weights[2 * r], bottom = c.weights[2 * r + 1];
        const uint32_t low[4] = {top.x, bottom.x, top.y, bottom.y};
        const uint32_t high[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          device::mma_m16n8k16<T>(acc[r][i], low, c.x[i].x, c.x[i].y);
          device::mma_m16n8k16<T>(acc[r][i], high, c.x[i].z, c.x[i].w);
        }
      }
    }
  }

  float* sums = reinterpret_cast<float*>(device::dynamic_shared());
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp * kFeatures + r * kFewFeatures + g + e / 2 * 8;
        sums[row * kStride + i * 8 + t * 2 + e % 2] = acc[r][i][e];
      }
    }
  }
  __syncthreads();
  device::dispatch_activation(p.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    for (int i = threadIdx.x; i < kFeatures * static_cast<int>(p.tokens); i += blockDim.x) {
      const int64_t token = i / kFeatures;
      const int row = i % kFeatures, n = feature + row;
      if (n >= p.out_features) continue;
      float z = p.bias != nullptr ? device::to_float(static_cast<const T*>(p.bias)[n]) : 0.f;
      for (int w = 0; w < warps; ++w) z += sums[(w * kFeatures + row) * kStride + token];
      const auto [value, slope] = device::activate_with_slope<kActivation, false>(z);
      if (p.slope_out != nullptr) {
        using Slope = device::SlopeOf<T>;
        static_cast<Slope*>(p.slope_out)[token * p.slope_out_stride + n] =
            device::from_float<Slope>(slope);
      }
      float y = value;
      if (p.residual != nullptr) {
        const T* residual = static_cast<const T*>(p.residual);
        y += device::to_float(residual[token * p.residual_stride + n]);
      }
      static_cast<T*>(p.y)[token * p.y_stride + n] = device::from_float<T>(y);
    }
  });
}

}  // namespace pixelfly::sm80
