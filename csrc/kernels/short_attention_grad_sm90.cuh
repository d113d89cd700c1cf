// dq, dk and dv of short attention, each written once, no atomics; Hopper (sm_90a).
//
// A thread block takes one head after the other. A warp has 32 keys: with scores transposed, S =
// k qᵀ, the exponentials P and dS = P ⊙ (v dyᵀ - D) are where dv += P dy and dk += dS q want them.
// dS is kept in shared memory as well; when all of it is there, the warps change over to 32
// queries each for dq = dSᵀ k, and TMA brings the next head's q, v and dy in place of this one's.
//
//   shared memory: q, dy, v, two k's, each [tokens, rounded up to 16][64], rows beyond them 0;
//     dS [keys][queries], its rows 16 bytes longer, so that eight of them lie in different banks;
//     for each two queries their log sums and their D = Σ dy ⊙ y
//   full: TMA -> all threads, a phase a head
#pragma once

#include "kernels/short_attention_sm90.cuh"

namespace pixelfly {

struct ShortAttentionGradArgs {
  int32_t tokens, heads;
  int32_t tiles;
  int32_t problems;
  float scale;
  const void* y;
  const float* log_sum;
  void* dqkv;
};

namespace attention {

constexpr int score_row_bytes(int tiles) { return tiles * 32 + 16; }
constexpr int grad_shared_bytes(int tiles) {
  return tiles * (5 * kTileBytes + kRows * score_row_bytes(tiles) + kRows * 8) + 1024;
}

// A lane's row of y and its log sum, asked for a head ahead.
template <typename T>
struct OutputRow {
  uint4 chunk[8];
  float log_sum;

  __device__ __forceinline__ void load(const ShortAttentionGradArgs& args, int problem, int row) {
    *this = {};  // so that no earlier values stay
    if (problem >= args.problems || row >= args.tokens) return;
    const int64_t at = int64_t{problem / args.heads} * args.tokens + row;
    const T* from = static_cast<const T*>(args.y) +
                    (at * args.heads + problem % args.heads) * kShortAttentionFeatures;
#pragma unroll
    for (int i = 0; i < 8; ++i) chunk[i] = reinterpret_cast<const uint4*>(from)[i];
    log_sum = args.log_sum[int64_t{problem} * args.tokens + row];
  }
  // Σ dy ⊙ y, with the row of dy in shared memory.
  __device__ __forceinline__ float dot(uint32_t dy, int row) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 other = device::load_shared_vector(dy + row * kRowBytes + ((i ^ row % 8) << 4));
      const uint32_t a[4] = {chunk[i].x, chunk[i].y, chunk[i].z, chunk[i].w};
      const uint32_t b[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 left = device::unpack2<T>(a[e]), right = device::unpack2<T>(b[e]);
        sum += left.x * right.x + left.y * right.y;
      }
    }
    return sum;
  }
};

}  // namespace attention

template <typename T>
__global__ void __launch_bounds__(kShortAttentionThreads, 1)
    short_attention_grad_sm90(const __grid_constant__ ShortAttentionMaps maps,
                              const ShortAttentionGradArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace attention;
  __shared__ uint64_t barrier;
  const int tiles = args.tiles, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t bytes = tiles * kTileBytes;  // of a matrix
  const uint32_t base = (device::smem_address(device::dynamic_shared()) + 1023) & ~1023u;
  const uint32_t q = base, dy = q + bytes, v = dy + bytes, keys = v + bytes;
  const uint32_t scores = keys + 2 * bytes, score_row = score_row_bytes(tiles);
  const uint32_t stats = scores + tiles * kRows * score_row;
  const uint32_t full = device::smem_address(&barrier);
  const float scale_log2 = args.scale * kLog2e;
  const Lanes lanes;
  if (threadIdx.x == 0) {
    device::mbarrier_init(full, 1);
    device::mbarrier_init_fence();
  }
  auto load = [&](int problem, int stage) {
    const int sample = problem / args.heads, head = problem % args.heads;
    device::mbarrier_expect_tx(full, 4 * bytes);
    load_head(q, &maps.qkv, full, head, sample);
    load_head(keys + stage * bytes, &maps.qkv, full, args.heads + head, sample);
    load_head(v, &maps.qkv, full, 2 * args.heads + head, sample);
    load_head(dy, &maps.dy, full, head, sample);
  };
  const int row = threadIdx.x, first = warp * kWarpRows;  // the thread's row, its warp's first
  OutputRow<T> output;
  if (threadIdx.x == 0) load(blockIdx.x, 0);
  output.load(args, blockIdx.x, row);
  __syncthreads();  // the barrier is there

  int turn = 0;
  for (int problem = blockIdx.x; problem < args.problems; problem += gridDim.x, ++turn) {
    const int stage = turn % 2, next = problem + gridDim.x;
    const uint32_t k = keys + stage * bytes;
    device::mbarrier_wait(full, turn % 2);
    if (row < tiles * kRows) {  // queries 2 i, 2 i + 1: two log sums, two D. Beyond tokens P is 0
      const bool inside = row < args.tokens;
      const float sum = inside ? output.dot(dy, row) : 0;
      const uint32_t at = stats + row / 2 * 16 + row % 2 * 4;
      device::store_shared(at, __float_as_uint(inside ? output.log_sum * kLog2e : INFINITY));
      device::store_shared(at + 8, __float_as_uint(sum));
    }
    __syncthreads();  // they are there, and nobody reads the last head's dS

    Sums dk, dv;
    RowFragments key_rows;
    key_rows.load(k, warp, tiles, lanes);
    const uint32_t to = scores + (first + lane % 16) * score_row + lane / 16 * 16;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      float p[kWarpTiles][2][4] = {}, ds[kWarpTiles][2][4] = {};
      add_scores<T>(p, key_rows, q + i * kTileBytes, lanes);
      RowFragments value_rows;  // read anew for every tile: registers are short
      value_rows.load(v, warp, tiles, lanes);
      add_scores<T>(ds, value_rows, dy + i * kTileBytes, lanes);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 two = device::load_shared_vector(stats + (i * 8 + n * 4 + lane % 4) * 16);
        const float log_sums[2] = {__uint_as_float(two.x), __uint_as_float(two.y)};
        const float d[2] = {__uint_as_float(two.z), __uint_as_float(two.w)};
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            // At most 1, as it is: so a key beyond the tokens, whose k is 0, adds nothing to dq.
            const float power = device::min_nan(p[m][n][e] * scale_log2 - log_sums[e % 2], 0);
            p[m][n][e] = device::exp2_approx(power);
            ds[m][n][e] = p[m][n][e] * (ds[m][n][e] - d[e % 2]);
          }
        }
      }
      uint32_t weights[kWarpTiles][4];
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) as_weights<T>(weights[m], p[m]);
      add_rows<T>(dv, weights, dy + i * kTileBytes, lanes);
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        as_weights<T>(weights[m], ds[m]);
        const int key = first + m * kRows;
        if (key < args.tokens) {
          device::stmatrix_x4(to + i * 32 + m * kRows * score_row, weights[m]);
        }
      }
      add_rows<T>(dk, weights, q + i * kTileBytes, lanes);
    }
    __syncthreads();  // dS is there, and nobody reads q, v and dy
    if (threadIdx.x == 0 && next < args.problems) load(next, 1 - stage);

    const int sample = problem / args.heads, head = problem % args.heads;
    const int64_t width = int64_t{args.heads} * kShortAttentionFeatures, stride = 3 * width;
    T* grads = static_cast<T*>(args.dqkv) + (int64_t{sample} * args.tokens + first) * stride +
               head * kShortAttentionFeatures;
    auto store = [&](T* to, const Sums& sums, float factor) {
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        store_rows(to + m * kRows * stride, stride, args.tokens - first - m * kRows, sums.of[m],
                   factor, factor);
      }
    };
    store(grads + width, dk, args.scale);
    store(grads + 2 * width, dv, 1.f);
    output.load(args, next, row);

    Sums dq;
    uint32_t from[kWarpTiles];
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
      const int tile = min(warp * kWarpTiles + m, tiles - 1);
      from[m] = scores + (lane % 8 + lane / 16 * 8) * score_row + tile * 32 + lane / 8 % 2 * 16;
    }
#pragma unroll 4
    for (int i = 0; i < tiles; ++i) {
      uint32_t weights[kWarpTiles][4];
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        device::ldmatrix_x4_trans(weights[m], from[m] + i * kRows * score_row);
      }
      add_rows<T>(dq, weights, k + i * kTileBytes, lanes);
    }
    store(grads, dq, args.scale);
  }
#endif
}

}  // namespace pixelfly
