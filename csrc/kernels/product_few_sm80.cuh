// y = act(x · Bᵀ + t · uᵀ + bias) + residual for few tokens (decoding), and dx = (dz · B + s · v) ⊙
// slope: bound by reading each weight, once for 64 tokens (32 where multiprocessors would be idle),
// on mma.sync, for every GPU from sm_80 on. Also t = x · vᵀ: a product without blocks.
//
// A group of warps makes 16 features of up to 64 tokens. They take chunks of 32 contraction
// features in turn: weights are mma's A (M = 16 features), up to 8 kTiles tokens are N. Nothing is
// staged: the order of k within a chunk is free as long as A and B agree, so each lane loads 16
// contiguous bytes of its row and column, which are the fragments of two k16 products. The warps'
// partial sums meet in shared memory, in order. A thread block is a group, or two that read the
// same x, which then comes from L2 once. A dependent launch: from sm_90 on it may start, and with
// up to 16 tokens have its weights brought to L2 (not for dx), while the kernel before it ends.
//
// dx: the weights are columns of blocks. A lane loads pairs of neighbouring features from eight
// rows; even features are A's rows g, odd ones g + 8.
//
//   shared memory of a group: float [16] biases, [warps][8 kTiles tokens][16 features + 4] sums
#pragma once

#include "device/convert.cuh"
#include "device/dependent_launch.cuh"
#include "device/epilogue_math.cuh"
#include "device/mma.cuh"
#include "device/shared_memory.cuh"
#include "device/slope_code.cuh"
#include "kernels/four_outputs.cuh"
#include "pixelfly/params.h"

namespace pixelfly::sm80 {

constexpr int kFewFeatures = 16;  // of a group of warps
constexpr int kFewDepthLog2 = 5;
constexpr int kFewDepth = 1 << kFewDepthLog2;  // contraction features of a chunk
constexpr int kFewMaxTiles = 8;                // of 8 tokens
constexpr int kFewMaxWarps = 16;
constexpr int kFewStride = kFewFeatures + 4;  // of a token: writes meet no bank twice

// Shared memory of a group.
constexpr int few_shared_floats(int warps, int tiles) {
  return kFewFeatures + warps * tiles * 8 * kFewStride;
}

struct FewArgs {
  ProductParams p;
  const int32_t* row_ptr;    // [block rows + 1]; null: no blocks. dx: of block columns
  const int32_t* col_idx;    // [nnz]; dx: block rows
  const int32_t* block_idx;  // [nnz], dx only: blocks column by column
  int32_t block_log2;        // 5, 6 or 7; a division would take as long as a load
  int32_t rank;
  bool quads_aligned;  // four outputs, residuals and slopes lie as a vector
};

// 8 contiguous elements of a row, or zeros. Not by __ldg: a compiler may move that in front of
// wait_for_previous_kernel().
__device__ __forceinline__ uint4 load_vector(const void* row, bool valid) {
  return valid ? *static_cast<const uint4*>(row) : uint4{0, 0, 0, 0};
}

// One chunk: a lane's weights of rows g and g + 8 (dx: eight pairs of both), and its 8 values of
// each token tile.
template <int kTiles>
struct FewChunk {
  uint4 weights[2];
  uint4 x[kTiles];
};

// Pairs of features from the eight rows that begin at `first`.
template <typename T>
__device__ __forceinline__ void load_pairs(uint4 (&pairs)[2], const T* first, int stride,
                                           bool valid) {
  uint32_t of[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    of[i] = valid ? *reinterpret_cast<const uint32_t*>(first + i * stride) : 0;
  }
  pairs[0] = {of[0], of[1], of[2], of[3]};
  pairs[1] = {of[4], of[5], of[6], of[7]};
}

// Eight pairs, one below the other, as two columns.
__device__ __forceinline__ void transpose_pairs(uint4 (&pairs)[2]) {
  const uint32_t of[8] = {pairs[0].x, pairs[0].y, pairs[0].z, pairs[0].w,
                          pairs[1].x, pairs[1].y, pairs[1].z, pairs[1].w};
  auto even = [&](int i) { return (of[i] & 0xffff) | of[i + 1] << 16; };
  auto odd = [&](int i) { return of[i] >> 16 | (of[i + 1] & 0xffff0000); };
  pairs[0] = {even(0), even(2), even(4), even(6)};
  pairs[1] = {odd(0), odd(2), odd(4), odd(6)};
}

template <typename T, bool kTransposed, int kTiles>
__device__ __forceinline__ void load_chunk(FewChunk<kTiles>& c, const FewArgs& args, int chunk,
                                           int block_chunks, int first_entry, int feature,
                                           int first_token) {
  const ProductParams& p = args.p;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T* source;  // x or t at this lane's k
  int64_t stride;
  bool inside;
  if (chunk < block_chunks) {
    const int log2 = args.block_log2, parts_log2 = log2 - kFewDepthLog2;
    const int entry = first_entry + (chunk >> parts_log2);
    const int k = (chunk & ((1 << parts_log2) - 1)) * kFewDepth + t * 8;
    const int within = feature & ((1 << log2) - 1);
    const T* blocks = static_cast<const T*>(p.blocks);
    if constexpr (kTransposed) {
      const int64_t row = (int64_t{args.block_idx[entry]} << log2) + k;
      load_pairs(c.weights, blocks + (row << log2) + within + 2 * g, 1 << log2, true);
    } else {
      const T* weights = blocks + (((int64_t{entry} << log2) + within + g) << log2) + k;
      c.weights[0] = load_vector(weights, true);
      c.weights[1] = load_vector(weights + (8 << log2), true);
    }
    const int col = (args.col_idx[entry] << log2) + k;
    source = static_cast<const T*>(p.x) + col;
    stride = p.x_stride;
    inside = col < p.in_features;
  } else {
    const int k = (chunk - block_chunks) * kFewDepth + t * 8;
    inside = k < args.rank;
    const T* factor = static_cast<const T*>(p.factor);
    if constexpr (kTransposed) {
      const int column = feature + 2 * g;
      const auto row_stride = static_cast<int>(p.factor_stride);
      load_pairs(c.weights, factor + k * p.factor_stride + column, row_stride,
                 inside && column < p.out_features);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = feature + g + h * 8;
        c.weights[h] =
            load_vector(factor + row * p.factor_stride + k, inside && row < p.out_features);
      }
    }
    source = static_cast<const T*>(p.t) + k;
    stride = p.t_stride;
  }
  const int token = first_token + g;
  const int left = inside ? static_cast<int>(p.tokens) - token : 0;
  source += token * stride;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    c.x[i] = load_vector(source, i * 8 < left);
    source += 8 * stride;
  }
}

// A thread block's weights on their way to L2.
template <typename T>
__device__ __forceinline__ void prefetch_weights(const FewArgs& args, int first, int last,
                                                 int feature) {
  constexpr int kLine = 128 / sizeof(T);
  constexpr int kPartLinesLog2 = 3;  // of kFewFeatures rows of a chunk
  static_assert(kFewFeatures * kFewDepth == kLine << kPartLinesLog2);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int log2 = args.block_log2;
  const int lines_log2 = log2 - kFewDepthLog2 + kPartLinesLog2;  // of a block, all in one piece
  const T* blocks = static_cast<const T*>(args.p.blocks) + ((feature & ((1 << log2) - 1)) << log2);
  for (int i = thread; i < (last - first) << lines_log2; i += threads) {
    device::prefetch_before_wait(blocks + (int64_t{first + (i >> lines_log2)} << 2 * log2) +
                                 (i & ((1 << lines_log2) - 1)) * kLine);
  }
  const T* factor = static_cast<const T*>(args.p.factor);
  const int rows = min(kFewFeatures, args.p.out_features - feature);
  for (int i = thread; i * kLine < args.rank; i += threads) {
    for (int row = feature; row < feature + rows; ++row) {
      device::prefetch_before_wait(factor + row * args.p.factor_stride + i * kLine);
    }
  }
}

template <typename T, int kTiles, bool kTransposed>
__global__ void __launch_bounds__(kFewMaxWarps * 32)
    product_few_sm80(const __grid_constant__ FewArgs args) {
  constexpr int kAhead = kTiles <= 2 ? 4 : 2;  // chunks in flight
  constexpr int kTokens = kTiles * 8;
  // The next kernel may start at once, which loses with 64 tokens, or after the products, which
  // gains with 64 (csrc/README.md).
  constexpr bool kEarly = kTiles <= 2;
  if constexpr (kEarly) device::allow_dependent_launch();
  const ProductParams& p = args.p;
  const int feature = (blockIdx.x * blockDim.y + threadIdx.y) * kFewFeatures;
  const int first_token = blockIdx.y * kTokens;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int first = 0, last = 0;
  if (args.row_ptr != nullptr) {
    first = args.row_ptr[feature >> args.block_log2];
    last = args.row_ptr[(feature >> args.block_log2) + 1];
  }
  if constexpr (kEarly && !kTransposed) prefetch_weights<T>(args, first, last, feature);
  const int block_chunks = (last - first) << (args.block_log2 - kFewDepthLog2);
  const int chunks = block_chunks + (args.rank + kFewDepth - 1) / kFewDepth;
  device::wait_for_previous_kernel();  // of what came before, only the plan has been read

  // Thread i brings bias i, which arrives while the products are formed.
  const int thread = static_cast<int>(threadIdx.x);
  T bias{};
  if (!kTransposed && p.bias != nullptr && thread < min(kFewFeatures, p.out_features - feature)) {
    bias = static_cast<const T*>(p.bias)[feature + thread];
  }

  float acc[kTiles][4] = {};
  for (int begin = warp; begin < chunks; begin += warps * kAhead) {
    FewChunk<kTiles> ahead[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int chunk = begin + a * warps;
      if (chunk < chunks) {
        load_chunk<T, kTransposed>(ahead[a], args, chunk, block_chunks, first, feature,
                                   first_token);
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (begin + a * warps >= chunks) break;
      FewChunk<kTiles>& c = ahead[a];
      if constexpr (kTransposed) transpose_pairs(c.weights);
      const uint32_t low[4] = {c.weights[0].x, c.weights[1].x, c.weights[0].y, c.weights[1].y};
      const uint32_t high[4] = {c.weights[0].z, c.weights[1].z, c.weights[0].w, c.weights[1].w};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        device::mma_m16n8k16<T>(acc[i], low, c.x[i].x, c.x[i].y);
        device::mma_m16n8k16<T>(acc[i], high, c.x[i].z, c.x[i].w);
      }
    }
  }

  if constexpr (!kEarly) device::allow_dependent_launch();
  float* biases = reinterpret_cast<float*>(device::dynamic_shared()) +
                  threadIdx.y * few_shared_floats(warps, kTiles);
  float* sums = biases + kFewFeatures;
  if (thread < kFewFeatures) biases[thread] = device::to_float(bias);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = i * 8 + t * 2 + e % 2;
      const int row = kTransposed ? 2 * g + e / 2 : g + e / 2 * 8;
      sums[(warp * kTokens + token) * kFewStride + row] = acc[i][e];
    }
  }
  // A thread finishes four features, the same ones of all its tokens.
  constexpr int kQuads = kFewFeatures / 4;
  const int quad = thread % kQuads * 4, n = feature + quad;
  const int count = min(4, p.out_features - n);
  const bool whole = count == 4 && args.quads_aligned;
  __syncthreads();
  const auto start = *reinterpret_cast<const Four<float>*>(biases + quad);
  device::dispatch_activation(p.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    const int tokens = min(kTokens, static_cast<int>(p.tokens) - first_token);
    const int step = static_cast<int>(blockDim.x) / kQuads;
    for (int local = thread / kQuads; local < tokens; local += step) {
      const int token = first_token + local;
      using Slope = device::SlopeOf<T>;
      Four<Slope> slopes{};
      if (kTransposed && p.slope != nullptr) {
        slopes = load_four(static_cast<const Slope*>(p.slope) + token * p.slope_stride + n, count,
                           whole);
      }
      Four<T> residual{};
      if (p.residual != nullptr) {
        residual = load_four(static_cast<const T*>(p.residual) + token * p.residual_stride + n,
                             count, whole);
      }
      Four<float> z = start;
#pragma unroll 4
      for (int w = 0; w < warps; ++w) {
        const float* row = sums + (w * kTokens + local) * kFewStride + quad;
        const auto sum = *reinterpret_cast<const Four<float>*>(row);
#pragma unroll
        for (int e = 0; e < 4; ++e) z.of[e] += sum.of[e];
      }
      finish_four<T, kTransposed, kActivation>(p, z, slopes, residual, token, n, count, whole);
    }
  });
}

}  // namespace pixelfly::sm80
