// y = softmax(scale q kᵀ) v for heads of 64 features and up to 208 tokens; Hopper (sm_90a).
//
// A thread block takes one head after the other: TMA brings the next one's q, k and v while this
// one's are multiplied, as all of them fit in shared memory twice. A warp has 32 queries and walks
// over the keys, 32 at a time, with the running shift and sum of each row in registers
// (Flash-attention's recurrence). Products are mma.sync: heads are too small and too ragged (197
// tokens in a ViT) for wgmma's 64 rows, of which a quarter would be empty.
//
//   qkv: a map of [samples][tokens][3 * heads * 64] with boxes of a head's rows
//   shared memory: two stages of q, k, v, each [tokens, rounded up to 16][64], rows beyond them 0
//   full[s]: TMA -> all threads; empty[s]: an arrival from each warp -> the thread that loads, in
//   the midst of its warp's next head, so that warps may be half a head apart
#pragma once

#include <cuda.h>

#include "device/approx.cuh"
#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "kernels/attention_tiles.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

constexpr int kShortAttentionWarps = 8;  // that a multiprocessor has registers for
static_assert(kShortAttentionTokens <= kShortAttentionWarps * 2 * attention::kRows);

struct ShortAttentionArgs {
  int32_t tokens, heads;
  int32_t tiles;     // of 16 tokens
  int32_t problems;  // samples * heads
  float scale;
  void* y;
  float* log_sum;
};

namespace attention {

constexpr int kWarpTiles = 2;  // a warp's queries
constexpr int kWarpRows = kWarpTiles * kRows;
constexpr float kLog2e = 1.44269504088896f;

// Loads the rows of one of a head's matrices; `column`: in heads.
__device__ inline void load_head(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                 int sample) {
  device::tma_load_3d(to, map, barrier, column * kShortAttentionFeatures, 0, sample);
}

// A warp's scores of kTiles tiles of keys, rows as RowFragments has them.
template <int kTiles>
struct Scores {
  float of[kTiles][kWarpTiles][2][4] = {};

  template <typename T>
  __device__ __forceinline__ void form(const RowFragments<kWarpTiles>& q, uint32_t k, int key,
                                       const Lanes& lanes) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      add_scores<T>(of[i], q, k + (key + i * kRows) * kRowBytes, lanes);
    }
  }
  // The last tile may have rows beyond the tokens.
  __device__ __forceinline__ void mask(int key, int tokens) {
    if (key + kTiles * kRows <= tokens) return;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = key + (kTiles - 1) * kRows + n * 8 + threadIdx.x % 4 * 2 + e % 2;
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
          if (at >= tokens) of[kTiles - 1][m][n][e] = -INFINITY;
        }
      }
    }
  }
  // This lane's largest score of half h of tile m's rows.
  __device__ __forceinline__ float largest(int m, int h) const {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        top = fmaxf(top, fmaxf(of[i][m][n][2 * h], of[i][m][n][2 * h + 1]));
      }
    }
    return top;
  }
};

// The output of a warp's queries while it walks over the keys: sums of exp2(score - shift) and of
// v times those. The shifts, near a row's largest score, are raised only when a score exceeds one
// by kSlack: so lanes need not agree on every tile's maximum.
constexpr float kSlack = 8;
constexpr float kLowest = -1e38f;  // below every score, but not -inf: that has no difference

struct Attended {
  float out[kWarpTiles][8][4] = {};
  float sum[kWarpTiles][2] = {};  // this lane's part
  float shift[kWarpTiles][2];

  __device__ __forceinline__ Attended() {
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) shift[m][0] = shift[m][1] = kLowest;
  }

  // Raises the shifts if these scores ask for it.
  template <int kTiles>
  __device__ __forceinline__ void admit(const Scores<kTiles>& scores, float scale_log2) {
    bool exceeds = false;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        exceeds |= scores.largest(m, h) * scale_log2 > shift[m][h] + kSlack;
      }
    }
    if (__any_sync(0xffffffffu, exceeds)) raise(scores, scale_log2);
  }

  // Adds keys whose scores were admitted; these become exponentials.
  template <typename T, int kTiles>
  __device__ __forceinline__ void add(Scores<kTiles>& scores, uint32_t v, int key, float scale_log2,
                                      const Lanes& lanes) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t weights[kWarpTiles][4];
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& p = scores.of[i][m][n][e];
            p = device::exp2_approx(p * scale_log2 - shift[m][e / 2]);
            sum[m][e / 2] += p;
          }
        }
        as_weights<T>(weights[m], scores.of[i][m]);
      }
      add_rows<T>(out, weights, v + (key + i * kRows) * kRowBytes, lanes);
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void raise(const Scores<kTiles>& scores, float scale_log2) {
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = scores.largest(m, h);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float raised = fmaxf(shift[m][h], top * scale_log2);
        const float factor = device::exp2_approx(shift[m][h] - raised);
        shift[m][h] = raised;
        sum[m][h] *= factor;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          out[m][j][2 * h] *= factor;
          out[m][j][2 * h + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace attention

template <typename T>
__global__ void __launch_bounds__(kShortAttentionWarps * 32, 1)
    short_attention_sm90(const __grid_constant__ CUtensorMap qkv, const ShortAttentionArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace attention;
  __shared__ uint64_t barriers[4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t bytes = args.tiles * kTileBytes;  // of a matrix
  const uint32_t base = (device::smem_address(device::dynamic_shared()) + 1023) & ~1023u;
  const uint32_t full = device::smem_address(barriers), empty = full + 16;
  const float scale_log2 = args.scale * kLog2e;
  const Lanes lanes;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      device::mbarrier_init(full + 8 * s, 1);
      device::mbarrier_init(empty + 8 * s, blockDim.x / 32);
    }
    device::mbarrier_init_fence();
  }
  auto load = [&](int problem, int stage) {
    const uint32_t to = base + stage * 3 * bytes, barrier = full + 8 * stage;
    device::mbarrier_expect_tx(barrier, 3 * bytes);
    for (int i = 0; i < 3; ++i) {
      load_head(to + i * bytes, &qkv, barrier, i * args.heads + problem % args.heads,
                problem / args.heads);
    }
  };
  __syncthreads();
  if (threadIdx.x == 0) load(blockIdx.x, 0);

  int turn = 0;
  for (int problem = blockIdx.x; problem < args.problems; problem += gridDim.x, ++turn) {
    const int stage = turn % 2, next = problem + gridDim.x;
    device::mbarrier_wait(full + 8 * stage, turn / 2 % 2);

    const uint32_t q = base + stage * 3 * bytes, k = q + bytes, v = k + bytes;
    RowFragments<kWarpTiles> queries;
    queries.load(q, warp * kWarpTiles, args.tiles, lanes);
    Attended attended;
    // An odd tile first, then pairs: the next pair's scores are formed while this one's are turned
    // into exponentials.
    int key = 0;
    if (args.tiles % 2 == 1) {
      Scores<1> odd;
      odd.form<T>(queries, k, 0, lanes);
      odd.mask(0, args.tokens);
      attended.admit(odd, scale_log2);
      attended.add<T>(odd, v, 0, scale_log2, lanes);
      key = kRows;
    }
    if (threadIdx.x == 0 && next < args.problems) {
      device::mbarrier_wait(empty + 8 * (1 - stage), (turn + 1) / 2 % 2 ^ 1);
      load(next, 1 - stage);
    }
    __syncwarp();
    const int last = (args.tiles - 2) * kRows;
    if (key <= last) {
      Scores<2> pair;
      pair.form<T>(queries, k, key, lanes);
      for (; key < last; key += 2 * kRows) {
        attended.admit(pair, scale_log2);
        Scores<2> next_pair;
        next_pair.form<T>(queries, k, key + 2 * kRows, lanes);
        attended.add<T>(pair, v, key, scale_log2, lanes);
        pair = next_pair;
      }
      pair.mask(last, args.tokens);
      attended.admit(pair, scale_log2);
      attended.add<T>(pair, v, last, scale_log2, lanes);
    }

    __syncwarp();
    if (lane == 0) device::mbarrier_arrive(empty + 8 * stage);

    const int sample = problem / args.heads, head = problem % args.heads;
    const int64_t stride = int64_t{args.heads} * kShortAttentionFeatures;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
      const int first = warp * kWarpRows + m * kRows;
      float factors[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = attended.sum[m][h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        factors[h] = device::reciprocal(sum);
        const int row = first + lane / 4 + 8 * h;
        if (lane % 4 == 0 && row < args.tokens) {
          args.log_sum[int64_t{problem} * args.tokens + row] =
              attended.shift[m][h] / kLog2e + logf(sum);
        }
      }
      T* y = static_cast<T*>(args.y) + (int64_t{sample} * args.tokens + first) * stride +
             head * kShortAttentionFeatures;
      store_rows(y, stride, args.tokens - first, attended.out[m], factors[0], factors[1]);
    }
  }
#endif
}

}  // namespace pixelfly
