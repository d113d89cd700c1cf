// y = act(x · Bᵀ + t · uᵀ + bias) + residual for few tokens (decoding): bound by reading each
// weight once, on mma.sync, for every GPU from sm_80 on. Also t = x · vᵀ: a product without blocks.
//
// A thread block makes 16 features of all tokens. Its warps take chunks of 32 contraction features
// in turn: weights are mma's A (M = 16 features), up to 8 kTiles tokens are N. Nothing is staged:
// the order of k within a chunk is free as long as A and B agree, so each lane loads 16 contiguous
// bytes of its row and column, which are the fragments of two k16 products. The warps' partial sums
// meet in shared memory, in order. A dependent launch: from sm_90 on it may start, and with few
// tokens have its weights brought to L2, while the kernel before it ends.
//
//   shared memory: float [warps][8 kTiles tokens][16 features + 4]
#pragma once

#include "device/convert.cuh"
#include "device/dependent_launch.cuh"
#include "device/epilogue_math.cuh"
#include "device/mma.cuh"
#include "device/shared_memory.cuh"
#include "device/slope_code.cuh"
#include "pixelfly/params.h"

namespace pixelfly::sm80 {

constexpr int kFewFeatures = 16;  // of a thread block
constexpr int kFewDepth = 32;     // contraction features of a chunk
constexpr int kFewMaxTiles = 8;   // of 8 tokens
constexpr int kFewMaxWarps = 16;
constexpr int kFewStride = kFewFeatures + 4;  // of a token: writes meet no bank twice

struct FewArgs {
  ProductParams p;
  const int32_t* row_ptr;  // [block rows + 1]; null: no blocks
  const int32_t* col_idx;  // [nnz]
  int32_t block_size;      // 32, 64 or 128
  int32_t rank;
  bool quads_aligned;  // four outputs, residuals and slopes lie as a vector
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T of[4];
};

// The first `count` of four; all at once if `whole`.
template <typename T>
__device__ __forceinline__ Four<T> load_four(const T* source, int count, bool whole) {
  if (whole) return *reinterpret_cast<const Four<T>*>(source);
  Four<T> values{};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (e < count) values.of[e] = source[e];
  }
  return values;
}

template <typename T>
__device__ __forceinline__ void store_four(T* target, const Four<T>& values, int count,
                                           bool whole) {
  if (whole) {
    *reinterpret_cast<Four<T>*>(target) = values;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (e < count) target[e] = values.of[e];
  }
}

// 8 contiguous elements of a row, or zeros. Not by __ldg: a compiler may move that in front of
// wait_for_previous_kernel().
__device__ __forceinline__ uint4 load_vector(const void* row, bool valid) {
  return valid ? *static_cast<const uint4*>(row) : uint4{0, 0, 0, 0};
}

// One chunk: a lane's weights of rows g and g + 8, and its 8 values of each token tile.
template <int kTiles>
struct FewChunk {
  uint4 weights[2];
  uint4 x[kTiles];
};

template <typename T, int kTiles>
__device__ __forceinline__ void load_chunk(FewChunk<kTiles>& c, const FewArgs& args, int chunk,
                                           int block_chunks, int first_entry, int feature) {
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
    for (int h = 0; h < 2; ++h) {
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
    for (int h = 0; h < 2; ++h) {
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

// A thread block's weights on their way to L2.
template <typename T>
__device__ __forceinline__ void prefetch_weights(const FewArgs& args, int first, int last,
                                                 int feature) {
  constexpr int kLine = 128 / sizeof(T);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int b = args.block_size, lines = b * kFewFeatures / kLine;  // of a block, all in one piece
  const T* blocks = static_cast<const T*>(args.p.blocks) + feature % b * b;
  for (int i = thread; i < (last - first) * lines; i += threads) {
    device::prefetch_before_wait(blocks + static_cast<int64_t>(first + i / lines) * b * b +
                                 i % lines * kLine);
  }
  const T* factor = static_cast<const T*>(args.p.factor);
  const int rows = min(kFewFeatures, args.p.out_features - feature);
  for (int i = thread; i * kLine < args.rank; i += threads) {
    for (int row = feature; row < feature + rows; ++row) {
      device::prefetch_before_wait(factor + row * args.p.factor_stride + i * kLine);
    }
  }
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kFewMaxWarps * 32)
    product_few_sm80(const __grid_constant__ FewArgs args) {
  constexpr int kAhead = kTiles <= 2 ? 4 : 2;  // chunks in flight
  constexpr int kTokens = kTiles * 8;
  // Gains with one token and loses with 64 (csrc/README.md); what lies between was not timed.
  constexpr bool kEarly = kTiles <= 2;
  if constexpr (kEarly) device::allow_dependent_launch();
  const ProductParams& p = args.p;
  const int feature = blockIdx.x * kFewFeatures;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int first = 0, last = 0;
  if (args.row_ptr != nullptr) {
    first = args.row_ptr[feature / args.block_size];
    last = args.row_ptr[feature / args.block_size + 1];
  }
  if constexpr (kEarly) prefetch_weights<T>(args, first, last, feature);
  device::wait_for_previous_kernel();  // of what came before, only the plan has been read
  const int block_chunks = (last - first) * (args.block_size / kFewDepth);
  const int chunks = block_chunks + (args.rank + kFewDepth - 1) / kFewDepth;

  float acc[kTiles][4] = {};
  for (int begin = warp; begin < chunks; begin += warps * kAhead) {
    FewChunk<kTiles> ahead[kAhead];
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
      const FewChunk<kTiles>& c = ahead[a];
      const uint32_t low[4] = {c.weights[0].x, c.weights[1].x, c.weights[0].y, c.weights[1].y};
      const uint32_t high[4] = {c.weights[0].z, c.weights[1].z, c.weights[0].w, c.weights[1].w};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        device::mma_m16n8k16<T>(acc[i], low, c.x[i].x, c.x[i].y);
        device::mma_m16n8k16<T>(acc[i], high, c.x[i].z, c.x[i].w);
      }
    }
  }

  float* sums = reinterpret_cast<float*>(device::dynamic_shared());
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = i * 8 + t * 2 + e % 2;
      sums[(warp * kTokens + token) * kFewStride + g + e / 2 * 8] = acc[i][e];
    }
  }
  // A thread finishes four features, the same ones of all its tokens.
  constexpr int kQuads = kFewFeatures / 4;
  const int quad = static_cast<int>(threadIdx.x) % kQuads * 4, n = feature + quad;
  const int count = min(4, p.out_features - n);
  const bool whole = count == 4 && args.quads_aligned;
  Four<T> bias{};
  if (p.bias != nullptr) bias = load_four(static_cast<const T*>(p.bias) + n, count, false);
  __syncthreads();
  device::dispatch_activation(p.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    const int step = static_cast<int>(blockDim.x) / kQuads;
    for (int token = static_cast<int>(threadIdx.x) / kQuads; token < p.tokens; token += step) {
      float z[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) z[e] = p.bias != nullptr ? device::to_float(bias.of[e]) : 0.f;
#pragma unroll 4
      for (int w = 0; w < warps; ++w) {
        const float* row = sums + (w * kTokens + token) * kFewStride + quad;
        const auto sum = *reinterpret_cast<const Four<float>*>(row);
#pragma unroll
        for (int e = 0; e < 4; ++e) z[e] += sum.of[e];
      }
      using Slope = device::SlopeOf<T>;
      Four<Slope> slopes;
      Four<T> y;
      Four<T> residual{};
      if (p.residual != nullptr) {
        residual = load_four(static_cast<const T*>(p.residual) + token * p.residual_stride + n,
                             count, whole);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const auto [value, slope] = device::activate_with_slope<kActivation, false>(z[e]);
        slopes.of[e] = device::from_float<Slope>(slope);
        const float added = p.residual != nullptr ? device::to_float(residual.of[e]) : 0.f;
        y.of[e] = device::from_float<T>(value + added);
      }
      if (p.slope_out != nullptr) {
        store_four(static_cast<Slope*>(p.slope_out) + token * p.slope_out_stride + n, slopes, count,
                   whole);
      }
      store_four(static_cast<T*>(p.y) + token * p.y_stride + n, y, count, whole);
    }
  });
}

}  // namespace pixelfly::sm80
