// dq, dk and dv of short attention, each written once, no atomics; Hopper (sm_90a).
//
// A thread block takes one head after the other. A warpgroup has 64 keys: with scores transposed, S
// = k qᵀ, the exponentials P and dS = P ⊙ (v dyᵀ - D) are, 16 queries at a time, in the registers
// from which wgmma takes them for dv += P dy and dk += dS q. dS is kept in shared memory as well;
// when all of it is there, the warps change over to 16 queries each for dq = dSᵀ k by mma.sync,
// which leaves out the rows beyond the tokens, and TMA brings the next head's q, v and dy in place
// of this one's.
//
//   shared memory: two k's, v, q, dy, each [tokens, rounded up to 16][64], rows beyond them 0; the
//     last warpgroup's keys may reach into what follows k or v, and its results there are dropped
//     dS [keys][queries], its rows 16 bytes longer, so that eight of them lie in different banks;
//     for each two queries their log sums and their D = Σ dy ⊙ y
//   full: TMA -> all threads, a phase a head
#pragma once

#include "device/wgmma.cuh"
#include "kernels/short_attention_sm90.cuh"

namespace pixelfly {

constexpr int kGradKeys = 64;  // of a warpgroup
constexpr int kShortAttentionGradThreads =
    (kShortAttentionTokens + kGradKeys - 1) / kGradKeys * 128;

struct ShortAttentionGradMaps {
  CUtensorMap qkv;  // as the forward's
  CUtensorMap dy;   // [samples][tokens][heads * 64], likewise
};

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
// A matrix has the rows of a warpgroup at least.
constexpr int grad_matrix_bytes(int tiles) {
  return (tiles < kGradKeys / kRows ? kGradKeys / kRows : tiles) * kTileBytes;
}
constexpr int grad_shared_bytes(int tiles) {
  return 5 * grad_matrix_bytes(tiles) + tiles * kRows * (score_row_bytes(tiles) + 8) + 1024;
}

// A lane's half of a row of y, and the row's log sum, asked for a head ahead.
template <typename T>
struct OutputRow {
  uint4 half[4];
  float log_sum;

  __device__ __forceinline__ void load(const ShortAttentionGradArgs& args, int problem, int row) {
    *this = {};  // so that no earlier values stay
    if (problem >= args.problems || row >= args.tokens) return;
    const int64_t at = int64_t{problem / args.heads} * args.tokens + row;
    const T* from = static_cast<const T*>(args.y) +
                    (at * args.heads + problem % args.heads) * kShortAttentionFeatures;
    const uint4* vectors = reinterpret_cast<const uint4*>(from) + threadIdx.x % 2 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) half[i] = vectors[i];
    log_sum = args.log_sum[int64_t{problem} * args.tokens + row];
  }
  // This half's part of Σ dy ⊙ y, with the row of dy in shared memory.
  __device__ __forceinline__ float dot(uint32_t dy, int row) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t chunk = threadIdx.x % 2 * 4 + i;
      const uint4 other =
          device::load_shared_vector(dy + row * kRowBytes + ((chunk ^ row % 8) << 4));
      const uint32_t a[4] = {half[i].x, half[i].y, half[i].z, half[i].w};
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

// sums [64 rows][16 rows of the tile] = rows · tileᵀ, asynchronously; by a warpgroup.
template <typename T>
__device__ __forceinline__ void form_scores(float (&sums)[8], uint32_t rows, uint32_t tile) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    device::wgmma<T, false, false>(sums, device::kDescriptorHigh | (rows + j * 2),
                                   device::kDescriptorHigh | (tile + j * 2), j != 0);
  }
}

// Sums as store_rows takes them.
__device__ __forceinline__ const float (&as_rows(const float (&sums)[32]))[8][4] {
  return reinterpret_cast<const float (&)[8][4]>(sums);
}

}  // namespace attention

template <typename T>
__global__ void __launch_bounds__(kShortAttentionGradThreads, 1)
    short_attention_grad_sm90(const __grid_constant__ ShortAttentionGradMaps maps,
                              const ShortAttentionGradArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace attention;
  __shared__ uint64_t barrier;
  const int tiles = args.tiles, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t bytes = grad_matrix_bytes(tiles);
  const uint32_t base = (device::smem_address(device::dynamic_shared()) + 1023) & ~1023u;
  const uint32_t keys = base, v = keys + 2 * bytes, q = v + bytes, dy = q + bytes;
  const uint32_t scores = dy + bytes, score_row = score_row_bytes(tiles);
  const uint32_t stats = scores + tiles * kRows * score_row;
  const uint32_t full = device::smem_address(&barrier);
  const float scale_log2 = args.scale * kLog2e;
  const Lanes lanes;
  if (threadIdx.x == 0) {
    device::mbarrier_init(full, 1);
    device::mbarrier_init_fence();
  }
  __syncthreads();
  auto load = [&](int problem, int stage) {
    const int sample = problem / args.heads, head = problem % args.heads;
    device::mbarrier_expect_tx(full, 4 * tiles * kTileBytes);
    load_head(q, &maps.qkv, full, head, sample);
    load_head(keys + stage * bytes, &maps.qkv, full, args.heads + head, sample);
    load_head(v, &maps.qkv, full, 2 * args.heads + head, sample);
    load_head(dy, &maps.dy, full, head, sample);
  };
  const int first = warp * kRows;   // of a warp's keys, and of its queries
  const int row = threadIdx.x / 2;  // of which a thread has a half
  OutputRow<T> output;
  if (threadIdx.x == 0) load(blockIdx.x, 0);
  output.load(args, blockIdx.x, row);

  int turn = 0;
  for (int problem = blockIdx.x; problem < args.problems; problem += gridDim.x, ++turn) {
    const int stage = turn % 2, next = problem + gridDim.x;
    const uint32_t k = keys + stage * bytes;
    device::mbarrier_wait(full, turn % 2);
    // For queries 2 i and 2 i + 1: two log sums, two D. Beyond the tokens P is to be 0.
    const bool inside = row < args.tokens;
    float sum = inside ? output.dot(dy, row) : 0;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (lane % 2 == 0 && row < tiles * kRows) {
      const uint32_t at = stats + row / 2 * 16 + row % 2 * 4;
      device::store_shared(at, __float_as_uint(inside ? output.log_sum * kLog2e : INFINITY));
      device::store_shared(at + 8, __float_as_uint(sum));
    }
    __syncthreads();  // they are there, and nobody reads the last head's dS

    // From one lane, so that the compiler knows it to be uniform.
    const uint32_t warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const uint32_t of_warpgroup = warpgroup * kGradKeys * kRowBytes;
    const uint32_t key_rows = device::descriptor_low(k + of_warpgroup, 0);
    const uint32_t value_rows = device::descriptor_low(v + of_warpgroup, 0);
    uint32_t q_tile = device::descriptor_low(q, 0), dy_tile = device::descriptor_low(dy, 0);
    uint32_t to = scores + (first + lane % 16) * score_row + lane / 16 * 16;
    uint32_t stat = stats + lane % 4 * 16;
    float dk[32] = {}, dv[32] = {};
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      // Of this lane's queries 2 l, 2 l + 1 and those 8 on: two log sums, two D.
      const uint4 two[2] = {device::load_shared_vector(stat),
                            device::load_shared_vector(stat + 64)};
      float p[8], ds[8];
      device::wgmma_fence();
      form_scores<T>(p, key_rows, q_tile);
      device::wgmma_commit();
      form_scores<T>(ds, value_rows, dy_tile);
      device::wgmma_commit();
      uint32_t pairs[2][4];
      device::wgmma_wait<1>();
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float log_sum = __uint_as_float(e % 2 == 0 ? two[e / 4].x : two[e / 4].y);
        p[e] = device::exp2_approx(p[e] * scale_log2 - log_sum);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[0][j] = device::pack2<T>(p[2 * j], p[2 * j + 1]);
      device::wgmma_fence();
      device::wgmma_registers<T, true>(dv, pairs[0], device::kDescriptorHigh | dy_tile, 1);
      device::wgmma_commit();
      device::wgmma_wait<1>();
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        ds[e] = p[e] * (ds[e] - __uint_as_float(e % 2 == 0 ? two[e / 4].z : two[e / 4].w));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[1][j] = device::pack2<T>(ds[2 * j], ds[2 * j + 1]);
      if (first < args.tokens) device::stmatrix_x4(to, pairs[1]);
      device::wgmma_fence();
      device::wgmma_registers<T, true>(dk, pairs[1], device::kDescriptorHigh | q_tile, 1);
      device::wgmma_commit();
      to += kRows * 2;
      stat += kRows / 2 * 16;
      q_tile += kTileBytes >> 4;
      dy_tile += kTileBytes >> 4;
    }
    device::wgmma_wait<0>();
    const int rows = args.tokens - first;  // of this warp
    if (0 < rows && rows < kRows) {  // keys beyond the tokens: k is 0 there, dS may be infinite
      static_assert(kShortAttentionTokens / 8 <= 32, "a lane clears 8 scores of a row");
      __syncwarp();
#pragma unroll 1
      for (int key = args.tokens; key < first + kRows; ++key) {
        const uint32_t at = scores + key * score_row + lane * 16;
        if (lane < tiles * 2) device::store_shared(at, uint4{0, 0, 0, 0});
      }
    }
    __syncthreads();  // dS is there, and nobody reads q, v and dy
    if (threadIdx.x == 0 && next < args.problems) load(next, 1 - stage);

    const int sample = problem / args.heads, head = problem % args.heads;
    const int64_t width = int64_t{args.heads} * kShortAttentionFeatures, stride = 3 * width;
    T* grads = static_cast<T*>(args.dqkv) + (int64_t{sample} * args.tokens + first) * stride +
               head * kShortAttentionFeatures;
    store_rows(grads + width, stride, rows, as_rows(dk), args.scale, args.scale);
    store_rows(grads + 2 * width, stride, rows, as_rows(dv), 1.f, 1.f);
    output.load(args, next, row);
    if (rows <= 0) continue;

    float dq[1][8][4] = {};
    const uint32_t from =
        scores + (lane % 8 + lane / 16 * 8) * score_row + first * 2 + lane / 8 % 2 * 16;
#pragma unroll 4
    for (int i = 0; i < tiles; ++i) {
      uint32_t weights[1][4];
      device::ldmatrix_x4_trans(weights[0], from + i * kRows * score_row);
      add_rows<T>(dq, weights, k + i * kTileBytes, lanes);
    }
    store_rows(grads, stride, rows, dq[0], args.scale, args.scale);
  }
#endif
}

}  // namespace pixelfly
