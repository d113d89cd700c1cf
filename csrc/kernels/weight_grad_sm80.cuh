// Weight gradients on mma.sync, for every GPU from sm_80 on: dB[k] = dzᵀ_i x_j for every kept
// block, du = dzᵀ t, dv = sᵀ x, dbias = Σ dz.
//
// The gradients form a list of b x b output tiles, each a product over tokens of a column tile of
// dz (or s) with a column tile of x (or t). A thread block takes one output tile and one span of
// tokens; its fp32 partial sum goes to the workspace [span][tile][b * b]. A second kernel adds the
// spans in order, so results are deterministic, and rounds once.
#pragma once

#include "kernels/tile_sm80.cuh"
#include "pixelfly/params.h"

namespace pixelfly::sm80 {

struct GradArgs {
  WeightGradParams p;
  const int32_t* row_idx;
  const int32_t* col_idx;
  int32_t num_blocks;  // tiles of dB, or 0 if dB is not wanted
  int32_t du_tiles;    // row tiles x rank tiles, or 0
  int32_t dv_tiles;    // rank tiles x column tiles, or 0
  int32_t rank;
  int32_t rank_tiles;
  int32_t num_cols;
  int32_t spans;
  int64_t span_tokens;
  bool dz_vectors, x_vectors, t_vectors, s_vectors;
  float* partial;
};

template <typename T, int kBlock>
struct GradShape {
  static constexpr int kTokens = sizeof(T) == 4 ? 32 : 64;
  static constexpr int kThreads = 128;
  static constexpr int kStages = 3;
  // b = 16: one warp covers a tile, so the four warps split the tokens of a stage instead.
  static constexpr int kWarpsK = kBlock == 16 ? 4 : 1;
  static constexpr int kWarpsSide = kBlock == 16 ? 1 : 2;
  static constexpr int kMTiles = kBlock / kWarpsSide / 16;
  static constexpr int kNTiles = kBlock / kWarpsSide / 8;
  static constexpr int kDepth = kTokens / kWarpsK;
  using Operand = Tile<T, kTokens, kBlock>;
  static constexpr int kSharedBytes = kStages * 2 * Operand::kBytes;
};

// One output tile: which columns of which operands, and where the result goes.
template <typename T>
struct GradTile {
  const T* a;
  const T* b;
  int64_t a_stride, b_stride;
  int a_valid, b_valid;  // columns before the operand ends
  bool a_vectors, b_vectors;
};

template <typename T, int kBlock>
__device__ __forceinline__ GradTile<T> grad_tile(const GradArgs& args, int tile) {
  const WeightGradParams& p = args.p;
  int a_tile, b_tile;
  bool from_s = false, from_t = false;
  if (tile < args.num_blocks) {
    a_tile = args.row_idx[tile];
    b_tile = args.col_idx[tile];
  } else if ((tile -= args.num_blocks) < args.du_tiles) {
    a_tile = tile / args.rank_tiles;
    b_tile = tile % args.rank_tiles;
    from_t = true;
  } else {
    tile -= args.du_tiles;
    a_tile = tile / args.num_cols;
    b_tile = tile % args.num_cols;
    from_s = true;
  }
  const int a_col = a_tile * kBlock, b_col = b_tile * kBlock;
  GradTile<T> out;
  out.a = static_cast<const T*>(from_s ? p.s : p.dz) + a_col;
  out.b = static_cast<const T*>(from_t ? p.t : p.x) + b_col;
  out.a_stride = from_s ? p.s_stride : p.dz_stride;
  out.b_stride = from_t ? p.t_stride : p.x_stride;
  out.a_valid = (from_s ? args.rank : p.out_features) - a_col;
  out.b_valid = (from_t ? args.rank : p.in_features) - b_col;
  out.a_vectors = from_s ? args.s_vectors : args.dz_vectors;
  out.b_vectors = from_t ? args.t_vectors : args.x_vectors;
  return out;
}

template <typename T, int kBlock>
__global__ void __launch_bounds__(128) weight_grad_sm80(const __grid_constant__ GradArgs args) {
  using S = GradShape<T, kBlock>;
  uint8_t* shared = device::dynamic_shared();
  const uint32_t base = device::smem_address(shared);
  const int tiles = args.num_blocks + args.du_tiles + args.dv_tiles;
  const int tile = blockIdx.x % tiles, span = blockIdx.x / tiles;
  const GradTile<T> op = grad_tile<T, kBlock>(args, tile);
  const int64_t begin = span * args.span_tokens;
  const int64_t end = min(begin + args.span_tokens, args.p.tokens);
  const int steps = static_cast<int>((end - begin + S::kTokens - 1) / S::kTokens);

  auto load = [&](int step) {
    if (step < steps) {
      const int64_t token = begin + static_cast<int64_t>(step) * S::kTokens;
      const int rows = static_cast<int>(min(end - token, int64_t{S::kTokens}));
      const uint32_t stage = base + step % S::kStages * 2 * S::Operand::kBytes;
      load_tile<T, S::kTokens, kBlock, S::kThreads>(stage, op.a + token * op.a_stride, op.a_stride,
                                                    rows, op.a_valid, op.a_vectors);
      load_tile<T, S::kTokens, kBlock, S::kThreads>(stage + S::Operand::kBytes,
                                                    op.b + token * op.b_stride, op.b_stride, rows,
                                                    op.b_valid, op.b_vectors);
    }
    device::cp_async_commit();
  };
  float acc[S::kMTiles][S::kNTiles][4] = {};
  const int warp = threadIdx.x / 32, side = warp % (S::kWarpsSide * S::kWarpsSide);
  const int m0 = side / S::kWarpsSide * (S::kMTiles * 16);
  const int n0 = side % S::kWarpsSide * (S::kNTiles * 8);
  const int k0 = S::kWarpsK > 1 ? warp * S::kDepth : 0;
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) load(i);
  for (int step = 0; step < steps; ++step) {
    device::cp_async_wait<S::kStages - 2>();
    __syncthreads();
    load(step + S::kStages - 1);
    const uint32_t a = base + step % S::kStages * 2 * S::Operand::kBytes;
    WarpProduct<T, S::kMTiles, S::kNTiles, S::kDepth, Order::kAcross, Order::kAcross,
                S::Operand::kRowBytes, S::Operand::kRowBytes>::run(acc, a, a + S::Operand::kBytes,
                                                                   m0, n0, k0, args.p.allow_tf32);
  }
  device::cp_async_wait<0>();

  float* out = args.partial + (static_cast<int64_t>(span) * tiles + tile) * kBlock * kBlock;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  auto write = [&](float* target, bool add) {
#pragma unroll
    for (int m = 0; m < S::kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < S::kNTiles; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* at = target + (m0 + m * 16 + g + h * 8) * kBlock + n0 + n * 8 + 2 * t;
          float2 v = make_float2(acc[m][n][2 * h], acc[m][n][2 * h + 1]);
          if (add) {
            const float2 old = *reinterpret_cast<float2*>(at);
            v = make_float2(old.x + v.x, old.y + v.y);
          }
          *reinterpret_cast<float2*>(at) = v;
        }
      }
    }
  };
  if constexpr (S::kWarpsK == 1) {
    write(out, false);
  } else {
    float* sum = reinterpret_cast<float*>(shared);
    for (int w = 0; w < S::kWarpsK; ++w) {  // in order: deterministic
      __syncthreads();
      if (warp == w) write(sum, w > 0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kBlock * kBlock; i += S::kThreads) out[i] = sum[i];
  }
}

template <typename T>
__device__ __forceinline__ void store_gradient(const WeightGradParams& p, void* base, int64_t at,
                                               float value) {
  if (p.grad_dtype == DType::kFloat32) {
    static_cast<float*>(base)[at] = value;
  } else {
    static_cast<T*>(base)[at] = device::from_float<T>(value);
  }
}

// Adds the spans of every output element in order and writes the gradient it belongs to.
template <typename T, int kBlock>
__global__ void reduce_weight_grad_sm80(const __grid_constant__ GradArgs args) {
  const int tiles = args.num_blocks + args.du_tiles + args.dv_tiles;
  const int64_t count = static_cast<int64_t>(tiles) * kBlock * kBlock;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float sum = 0.f;
  for (int s = 0; s < args.spans; ++s) sum += args.partial[s * count + i];
  const WeightGradParams& p = args.p;
  int tile = static_cast<int>(i / (kBlock * kBlock));
  const int row = static_cast<int>(i % (kBlock * kBlock)) / kBlock,
            col = static_cast<int>(i % kBlock);
  if (tile < args.num_blocks) {
    store_gradient<T>(p, p.dblocks, i, sum);
  } else if ((tile -= args.num_blocks) < args.du_tiles) {
    const int n = tile / args.rank_tiles * kBlock + row, r = tile % args.rank_tiles * kBlock + col;
    if (n < p.out_features && r < args.rank) {
      store_gradient<T>(p, p.du, static_cast<int64_t>(n) * args.rank + r, sum);
    }
  } else {
    tile -= args.du_tiles;
    const int r = tile / args.num_cols * kBlock + row, k = tile % args.num_cols * kBlock + col;
    if (r < args.rank && k < p.in_features) {
      store_gradient<T>(p, p.dv, static_cast<int64_t>(r) * p.in_features + k, sum);
    }
  }
}

constexpr int kBiasRows = 256;  // tokens a thread block sums

// partial[span][n] = Σ of dz over kBiasRows tokens. Threads: 32 columns x 8 rows.
template <typename T>
__global__ void bias_grad_partial(const T* dz, int64_t stride, int64_t tokens, int features,
                                  float* partial) {
  __shared__ float sums[8][32];
  const int n = blockIdx.x * 32 + threadIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kBiasRows;
  const int64_t end = min(begin + kBiasRows, tokens);
  float sum = 0.f;
  if (n < features) {
    for (int64_t t = begin + threadIdx.y; t < end; t += 8) {
      sum += device::to_float(dz[t * stride + n]);
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && n < features) {
    for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
    partial[static_cast<int64_t>(blockIdx.y) * features + n] = sum;
  }
}

template <typename T>
__global__ void bias_grad_reduce(const __grid_constant__ WeightGradParams p, const float* partial,
                                 int spans) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= p.out_features) return;
  float sum = 0.f;
  for (int s = 0; s < spans; ++s) sum += partial[static_cast<int64_t>(s) * p.out_features + n];
  store_gradient<T>(p, p.dbias, n, sum);
}

}  // namespace pixelfly::sm80
