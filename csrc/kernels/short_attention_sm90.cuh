// y = softmax(scale q kᵀ) v for heads of 64 features and up to 208 tokens; Hopper (sm_90a).
//
// A thread block takes one head after the other: TMA brings the next one's q, k and v while this
// one's are multiplied, as all of them fit in shared memory twice. A warp has 32 queries and walks
// over the keys, 64 at a time, with the running maximum and sum of each row in registers
// (Flash-attention's recurrence). Products are mma.sync: heads are too small and too ragged (197
// tokens in a ViT) for wgmma's 64 rows, of which a quarter would be empty.
//
//   shared memory: two stages of q, k, v, each [tokens, rounded up to 16][64]; rows beyond the
//   tokens are 0 full[s]: TMA -> all threads; a stage is free again when the block has met
#pragma once

#include <cuda.h>

#include "device/approx.cuh"
#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "kernels/attention_tiles.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

constexpr int kShortAttentionWarps = 8;  // with the registers of a multiprocessor
constexpr int kShortAttentionThreads = kShortAttentionWarps * 32;
static_assert(kShortAttentionTokens <= kShortAttentionWarps * attention::kWarpRows);

struct ShortAttentionMaps {
  CUtensorMap qkv;  // [samples][tokens][3 * heads * 64], boxes of a head's rows
  CUtensorMap dy;   // [samples][tokens][heads * 64], likewise; the gradient's alone
};

struct ShortAttentionArgs {
  int32_t tokens, heads;
  int32_t tiles;     // of 16 tokens
  int32_t problems;  // samples * heads
  float scale;
  void* y;
  float* log_sum;
};

namespace attention {

constexpr float kLog2e = 1.44269504088896f;

// Loads the rows of one of a head's matrices; `column`: in heads.
__device__ inline void load_head(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                 int sample) {
  device::tma_load_3d(to, map, barrier, column * kShortAttentionFeatures, 0, sample);
}

// One row's running maximum (of raw scores) and sum of exponentials.
struct RunningRow {
  float top = -INFINITY, sum = 0;
};

// Takes scores [tiles of 16][2][4] of half h of a tile's rows into those running rows and makes
// them exponentials. Returns what the sums so far are to be multiplied by.
template <int kTiles>
__device__ __forceinline__ float exponentials(RunningRow& row,
                                              float (&scores)[kTiles][kWarpTiles][2][4], int m,
                                              int h, float scale_log2) {
  float top = row.top;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      top = fmaxf(top, fmaxf(scores[i][m][n][2 * h], scores[i][m][n][2 * h + 1]));
    }
  }
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
  const float shift = top * scale_log2;
  const float factor = device::exp2_approx(row.top * scale_log2 - shift);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        float& score = scores[i][m][n][e];
        score = device::exp2_approx(score * scale_log2 - shift);
        sum += score;
      }
    }
  }
  row.sum = row.sum * factor + sum;  // this lane's part
  row.top = top;
  return factor;
}

// Adds kTiles tiles of keys from `key` on to the output of a warp's queries.
template <typename T, int kTiles>
__device__ __forceinline__ void attend(Sums& out, RunningRow (&rows)[kWarpTiles][2],
                                       const RowFragments& q, uint32_t k, uint32_t v, int key,
                                       int tokens, float scale_log2, const Lanes& lanes) {
  float scores[kTiles][kWarpTiles][2][4] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    add_scores<T>(scores[i], q, k + (key + i * kRows) * kRowBytes, lanes);
  }
  if (key + kTiles * kRows > tokens) {  // the last tile has rows beyond the tokens
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = key + (kTiles - 1) * kRows + n * 8 + threadIdx.x % 4 * 2 + e % 2;
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
          if (at >= tokens) scores[kTiles - 1][m][n][e] = -INFINITY;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = exponentials(rows[m][h], scores, m, h, scale_log2);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        out.of[m][j][2 * h] *= factor;
        out.of[m][j][2 * h + 1] *= factor;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    uint32_t weights[kWarpTiles][4];
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) as_weights<T>(weights[m], scores[i][m]);
    add_rows<T>(out, weights, v + (key + i * kRows) * kRowBytes, lanes);
  }
}

}  // namespace attention

template <typename T>
__global__ void __launch_bounds__(kShortAttentionThreads, 1)
    short_attention_sm90(const __grid_constant__ ShortAttentionMaps maps,
                         const ShortAttentionArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace attention;
  __shared__ uint64_t barriers[2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t bytes = args.tiles * kTileBytes;  // of a matrix
  const uint32_t base = (device::smem_address(device::dynamic_shared()) + 1023) & ~1023u;
  const uint32_t full = device::smem_address(barriers);
  const float scale_log2 = args.scale * kLog2e;
  const Lanes lanes;
  if (threadIdx.x == 0) {
    device::mbarrier_init(full, 1);
    device::mbarrier_init(full + 8, 1);
    device::mbarrier_init_fence();
  }
  auto load = [&](int problem, int stage) {
    const uint32_t to = base + stage * 3 * bytes, barrier = full + 8 * stage;
    device::mbarrier_expect_tx(barrier, 3 * bytes);
    for (int i = 0; i < 3; ++i) {
      load_head(to + i * bytes, &maps.qkv, barrier, i * args.heads + problem % args.heads,
                problem / args.heads);
    }
  };
  if (threadIdx.x == 0) load(blockIdx.x, 0);

  int turn = 0;
  for (int problem = blockIdx.x; problem < args.problems; problem += gridDim.x, ++turn) {
    const int stage = turn % 2, next = problem + gridDim.x;
    __syncthreads();  // nobody reads the other stage; at first: the barriers are there
    if (threadIdx.x == 0 && next < args.problems) load(next, 1 - stage);
    device::mbarrier_wait(full + 8 * stage, turn / 2 % 2);

    const uint32_t q = base + stage * 3 * bytes, k = q + bytes, v = k + bytes;
    RowFragments queries;
    queries.load(q, warp, args.tiles, lanes);
    Sums out;
    RunningRow rows[kWarpTiles][2];
    int i = 0;
    for (; i + 4 <= args.tiles; i += 4) {
      attend<T, 4>(out, rows, queries, k, v, i * kRows, args.tokens, scale_log2, lanes);
    }
    for (; i < args.tiles; ++i) {
      attend<T, 1>(out, rows, queries, k, v, i * kRows, args.tokens, scale_log2, lanes);
    }

    const int sample = problem / args.heads, head = problem % args.heads;
    const int64_t stride = int64_t{args.heads} * kShortAttentionFeatures;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
      const int first = warp * kWarpRows + m * kRows;
      float factors[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = rows[m][h].sum;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        factors[h] = 1.f / sum;
        const int row = first + lane / 4 + 8 * h;
        if (lane % 4 == 0 && row < args.tokens) {
          args.log_sum[int64_t{problem} * args.tokens + row] =
              rows[m][h].top * args.scale + logf(sum);
        }
      }
      T* y = static_cast<T*>(args.y) + (int64_t{sample} * args.tokens + first) * stride +
             head * kShortAttentionFeatures;
      store_rows(y, stride, args.tokens - first, out.of[m], factors[0], factors[1]);
    }
  }
#endif
}

}  // namespace pixelfly
