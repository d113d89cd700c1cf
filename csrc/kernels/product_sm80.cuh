// y = act(x · Bᵀ + t · uᵀ + bias) + residual on mma.sync, for every GPU from sm_80 on. Transposed:
// dx = (dz · B + s · v) ⊙ slope over the same stored blocks. Also t = x · vᵀ itself: a product
// that consists of its low-rank term alone.
//
// A thread block computes 128 tokens x one block row of y (b features, 64 for thin products). It
// walks the row's blocks and then the low-rank columns in steps of kDepth features, both operands
// through a ring of cp.async stages:
//   x tile [128 tokens][kDepth], weight tile [features][kDepth] (transposed: [kDepth][features]).
// The accumulators then pass through shared memory as fp32 so that bias, activation, residual and
// the stores work on 16-byte vectors of whole rows.
#pragma once

#include "device/epilogue_math.cuh"
#include "device/slope_code.cuh"
#include "kernels/tile_sm80.cuh"
#include "pixelfly/params.h"

namespace pixelfly::sm80 {

// The device view of a product; `plan` is null if there are no blocks.
struct ProductArgs {
  ProductParams p;
  const int32_t* row_ptr;  // [num_out_tiles + 1]
  const int32_t* col_idx;  // [nnz] contraction tile of each entry
  const int32_t* block;    // [nnz] block id of each entry; null: the entry's own number
  int32_t block_size;
  int32_t rank;
  int32_t out_tiles;
  bool x_vectors, blocks_vectors, t_vectors, factor_vectors, y_vectors, epilogue_vectors;
};

constexpr int kProductTokens = 128;

template <typename T, int kBlock>
struct ProductShape {
  static constexpr int kFeatures = kBlock;
  static constexpr int kDepth =
      kBlock < 128 / static_cast<int>(sizeof(T)) ? kBlock : 128 / static_cast<int>(sizeof(T));
  static constexpr int kWarpsN = kBlock >= 128 ? 2 : 1;
  static constexpr int kThreads = 128 * kWarpsN;
  static constexpr int kStages = 3;
  static constexpr int kNTiles = kFeatures / kWarpsN / 8;
  using XTile = Tile<T, kProductTokens, kDepth>;
  using DirectTile = Tile<T, kFeatures, kDepth>;
  using AcrossTile = Tile<T, kDepth, kFeatures>;
  static constexpr int kWeightBytes =
      DirectTile::kBytes > AcrossTile::kBytes ? DirectTile::kBytes : AcrossTile::kBytes;
  static constexpr int kStageBytes = XTile::kBytes + kWeightBytes;
  static constexpr int kStagingCols = kFeatures + 4;  // fp32, padded
  static constexpr int kStagingBytes = kProductTokens * kStagingCols * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kStagingBytes ? kStages * kStageBytes : kStagingBytes;
};

template <typename T, int kBlock, bool kTransposed>
__device__ __forceinline__ void load_step(const ProductArgs& args, int step, int block_steps,
                                          int first_entry, int out_tile, int64_t token,
                                          uint32_t stage) {
  using S = ProductShape<T, kBlock>;
  const ProductParams& p = args.p;
  const int rows = static_cast<int>(min(p.tokens - token, int64_t{kProductTokens}));
  const uint32_t weight = stage + S::XTile::kBytes;
  const int feature = out_tile * S::kFeatures;
  if (step < block_steps) {
    constexpr int kParts = kBlock / S::kDepth;
    const int entry = first_entry + step / kParts, part = step % kParts * S::kDepth;
    const int col = args.col_idx[entry] * kBlock + part;
    const int64_t id = args.block != nullptr ? args.block[entry] : entry;
    load_tile<T, kProductTokens, S::kDepth, S::kThreads>(
        stage, static_cast<const T*>(p.x) + token * p.x_stride + col, p.x_stride, rows,
        p.in_features - col, args.x_vectors);
    const T* block = static_cast<const T*>(p.blocks) + id * kBlock * kBlock;
    if constexpr (kTransposed) {
      load_tile<T, S::kDepth, S::kFeatures, S::kThreads>(weight, block + int64_t{part} * kBlock,
                                                         kBlock, S::kDepth, S::kFeatures,
                                                         args.blocks_vectors);
    } else {
      load_tile<T, S::kFeatures, S::kDepth, S::kThreads>(weight, block + part, kBlock, S::kFeatures,
                                                         S::kDepth, args.blocks_vectors);
    }
  } else {
    const int r = (step - block_steps) * S::kDepth;
    load_tile<T, kProductTokens, S::kDepth, S::kThreads>(
        stage, static_cast<const T*>(p.t) + token * p.t_stride + r, p.t_stride, rows, args.rank - r,
        args.t_vectors);
    const T* factor = static_cast<const T*>(p.factor);
    if constexpr (kTransposed) {
      load_tile<T, S::kDepth, S::kFeatures, S::kThreads>(
          weight, factor + r * p.factor_stride + feature, p.factor_stride, args.rank - r,
          p.out_features - feature, args.factor_vectors);
    } else {
      load_tile<T, S::kFeatures, S::kDepth, S::kThreads>(
          weight, factor + feature * p.factor_stride + r, p.factor_stride, p.out_features - feature,
          args.rank - r, args.factor_vectors);
    }
  }
}

// One vector (or its valid part) of a row, as fp32.
template <typename T, int kVec>
__device__ __forceinline__ void load_row(float (&out)[kVec], const T* source, int valid,
                                         bool vectors) {
  if (vectors) {
    using Vector = device::Vec<T, kVec>;
    Vector v;
    v.raw = *reinterpret_cast<const typename Vector::Raw*>(source);
#pragma unroll
    for (int e = 0; e < kVec; ++e) out[e] = v.get(e);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) out[e] = e < valid ? device::to_float(source[e]) : 0.f;
  }
}
template <typename T, int kVec>
__device__ __forceinline__ void store_row(T* target, const float (&in)[kVec], int valid,
                                          bool vectors) {
  using Vector = device::Vec<T, kVec>;
  Vector v;
#pragma unroll
  for (int e = 0; e < kVec; ++e) v.set(e, in[e]);
  if (vectors) {
    *reinterpret_cast<typename Vector::Raw*>(target) = v.raw;
  } else {
    for (int e = 0; e < kVec && e < valid; ++e) target[e] = device::from_float<T>(in[e]);
  }
}

template <typename T, int kBlock>
__device__ void product_epilogue(const ProductArgs& args, const float* staging, int64_t token,
                                 int feature) {
  using S = ProductShape<T, kBlock>;
  using Slope = device::SlopeOf<T>;
  constexpr int kVec = 16 / sizeof(T);
  constexpr bool kPrecise = sizeof(T) == 4;
  const ProductParams& p = args.p;
  device::dispatch_activation(p.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    constexpr int kVecs = kProductTokens * S::kFeatures / kVec;
    for (int i = threadIdx.x; i < kVecs; i += S::kThreads) {
      const int row = i / (S::kFeatures / kVec), col = i % (S::kFeatures / kVec) * kVec;
      const int64_t t = token + row;
      const int n = feature + col, valid = p.out_features - n;
      if (t >= p.tokens || valid <= 0) continue;
      float v[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] = staging[row * S::kStagingCols + col + e];
      if (p.bias != nullptr) {
        float bias[kVec];
        load_row(bias, static_cast<const T*>(p.bias) + n, valid, false);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[e] += bias[e];
      }
      if (p.slope_out != nullptr) {
        float slope[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const auto a = device::activate_with_slope<kActivation, kPrecise>(v[e]);
          v[e] = a.value;
          slope[e] = a.slope;
        }
        store_row(static_cast<Slope*>(p.slope_out) + t * p.slope_out_stride + n, slope, valid,
                  args.y_vectors);
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[e] = device::activate<kActivation, kPrecise>(v[e]);
      }
      if (p.slope != nullptr) {
        float slope[kVec];
        load_row(slope, static_cast<const Slope*>(p.slope) + t * p.slope_stride + n, valid,
                 args.epilogue_vectors);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[e] *= slope[e];
      }
      if (p.residual != nullptr) {
        float r[kVec];
        load_row(r, static_cast<const T*>(p.residual) + t * p.residual_stride + n, valid,
                 args.epilogue_vectors);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[e] += r[e];
      }
      store_row(static_cast<T*>(p.y) + t * p.y_stride + n, v, valid, args.y_vectors);
    }
  });
}

template <typename T, int kBlock, bool kTransposed>
__global__ void __launch_bounds__(ProductShape<T, kBlock>::kThreads)
    product_sm80(const __grid_constant__ ProductArgs args) {
  using S = ProductShape<T, kBlock>;
  uint8_t* shared = device::dynamic_shared();
  const uint32_t base = device::smem_address(shared);
  const int out_tile = blockIdx.x % args.out_tiles;  // neighbours share the x tile through L2
  const int64_t token = static_cast<int64_t>(blockIdx.x / args.out_tiles) * kProductTokens;
  int first = 0, last = 0;
  if (args.row_ptr != nullptr) {
    first = args.row_ptr[out_tile];
    last = args.row_ptr[out_tile + 1];
  }
  const int block_steps = (last - first) * (kBlock / S::kDepth);
  const int steps = block_steps + (args.rank + S::kDepth - 1) / S::kDepth;

  auto load = [&](int step) {
    if (step < steps) {
      load_step<T, kBlock, kTransposed>(args, step, block_steps, first, out_tile, token,
                                        base + step % S::kStages * S::kStageBytes);
    }
    device::cp_async_commit();
  };
  float acc[2][S::kNTiles][4] = {};
  const int warp = threadIdx.x / 32;
  const int m0 = warp % 4 * 32, n0 = warp / 4 * (S::kNTiles * 8);
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) load(i);
  for (int step = 0; step < steps; ++step) {
    device::cp_async_wait<S::kStages - 2>();
    __syncthreads();
    load(step + S::kStages - 1);
    const uint32_t x = base + step % S::kStages * S::kStageBytes;
    const uint32_t weight = x + S::XTile::kBytes;
    constexpr Order kOrder = kTransposed ? Order::kAcross : Order::kDirect;
    constexpr int kWeightRow = kTransposed ? S::AcrossTile::kRowBytes : S::DirectTile::kRowBytes;
    WarpProduct<T, 2, S::kNTiles, S::kDepth, Order::kDirect, kOrder, S::XTile::kRowBytes,
                kWeightRow>::run(acc, x, weight, m0, n0, 0, args.p.allow_tf32);
  }
  device::cp_async_wait<0>();
  __syncthreads();

  float* staging = reinterpret_cast<float*>(shared);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < S::kNTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* at = staging + (m0 + m * 16 + g + h * 8) * S::kStagingCols + n0 + n * 8 + 2 * t;
        *reinterpret_cast<float2*>(at) = make_float2(acc[m][n][2 * h], acc[m][n][2 * h + 1]);
      }
    }
  }
  __syncthreads();
  product_epilogue<T, kBlock>(args, staging, token, out_tile * S::kFeatures);
}

}  // namespace pixelfly::sm80
