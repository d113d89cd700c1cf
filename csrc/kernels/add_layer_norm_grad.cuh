// The gradients of add_layer_norm. With g = dy * weight and z = (h - mean) * rstd
//   dx = dh + rstd * (g - mean(g) - z * mean(g * z)),   dweight = Σ_T dy * z,   dbias = Σ_T dy.
//
// Thread blocks are persistent. A row (a warp's, or beyond 1024 features a thread block's) is read
// once and stays in registers; so do a thread's shares of dweight and dbias, over all its rows. In
// the end a thread block adds those of its warps and writes them to the workspace [thread block]
// [dweight, dbias][C], which a second kernel sums: in a fixed order, so results are deterministic.
#pragma once

#include "device/row_sum.cuh"
#include "kernels/layer_norm_row.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

// kThreads threads a row with kValues values each, kRows rows at a time in a thread block, and
// kBlocks thread blocks on a multiprocessor.
template <int kThreads_, int kValues_, int kRows_, int kBlocks_>
struct LayerNormGradShape {
  static constexpr int kThreads = kThreads_, kValues = kValues_, kRows = kRows_, kBlocks = kBlocks_;
  static_assert(kRows == 1 || kThreads == 32, "rows that share a thread block have a warp each");
  // The longest rows and their sums have no room in registers: they are read again, from L1.
  static constexpr bool kKeepsRow = kThreads * kValues <= 8192;
};

template <typename X, typename Narrow, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads* Shape::kRows, Shape::kBlocks)
    add_layer_norm_grad(const __grid_constant__ AddLayerNormGradParams p) {
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows;
  using Row = RowTile<X, kThreads, Shape::kValues>;
  constexpr int kVec = Row::kVec, kSteps = Row::kSteps;
  constexpr int kKept = Shape::kKeepsRow ? kSteps : 1;
  __shared__ float shared[2][2 * kThreads / 32];
  const float share = 1.f / static_cast<float>(p.features);
  const bool weight_is_x = p.weight_dtype == p.dtype;
  auto inside = [&](int step) { return Row::column(step) < p.features; };
  float dweight[Shape::kValues] = {}, dbias[Shape::kValues] = {};

  with_type<X, Narrow>(p.y_dtype == p.dtype, [&](auto tag) {
    using Y = typename decltype(tag)::Type;
    int turn = 0;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y; row < p.tokens;
         row += static_cast<int64_t>(gridDim.x) * kRows) {
      const int64_t at = row * p.features;
      typename Row::template Vec<X> h[kKept], dh[kKept];
      typename Row::template Vec<Y> dy[kKept];
      auto load = [&](int step, int slot) {
        h[slot].raw = {};
        dy[slot].raw = {};
        if (inside(step)) {
          h[slot] = Row::template load<X>(p.h, at + Row::column(step));
          dy[slot] = Row::template load<Y>(p.dy, at + Row::column(step));
        }
      };
      auto load_dh = [&](int step, int slot) {
        dh[slot].raw = {};
        if (p.dh != nullptr && inside(step)) {
          dh[slot] = Row::template load<X>(p.dh, at + Row::column(step));
        }
      };
      if constexpr (Shape::kKeepsRow) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) load(s, s);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) load_dh(s, s);
      }
      const float rstd = p.rstd[row], shift = -p.mean[row] * rstd;

      float sums[2] = {0.f, 0.f};  // of g and of g * z
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int slot = Shape::kKeepsRow ? s : 0;
        if constexpr (!Shape::kKeepsRow) load(s, 0);
        if (!inside(s)) continue;
        float weight[kVec];
        Row::load_weights(p.weight, weight_is_x, Row::column(s), weight);
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const float z = fmaf(h[slot].get(e), rstd, shift), up = dy[slot].get(e);
          const float g = up * weight[e];
          sums[0] += g;
          sums[1] = fmaf(g, z, sums[1]);
          dweight[s * kVec + e] = fmaf(up, z, dweight[s * kVec + e]);
          dbias[s * kVec + e] += up;
        }
      }
      device::row_sums<kThreads>(sums, shared[turn]);
      turn ^= 1;
      const float mean_g = sums[0] * share, mean_gz = sums[1] * share;

#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int slot = Shape::kKeepsRow ? s : 0;
        if constexpr (!Shape::kKeepsRow) {
          load(s, 0);
          load_dh(s, 0);
        }
        if (!inside(s)) continue;
        float weight[kVec];
        Row::load_weights(p.weight, weight_is_x, Row::column(s), weight);
        typename Row::template Vec<X> dx;
        typename Row::template Vec<Narrow> ddelta;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const float z = fmaf(h[slot].get(e), rstd, shift), g = dy[slot].get(e) * weight[e];
          const float d = fmaf(rstd, g - mean_g - z * mean_gz, dh[slot].get(e));
          dx.set(e, d);
          ddelta.set(e, d);
        }
        Row::template store<X>(p.dx, at + Row::column(s), dx);
        if (p.ddelta != nullptr) {
          Row::template store<Narrow>(p.ddelta, at + Row::column(s), ddelta);
        }
      }
    }
  });

  if (p.dweight == nullptr) return;
  auto write = [&](float* out, const float (&values)[Shape::kValues]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (!inside(s)) continue;
#pragma unroll
      for (int e = 0; e < kVec; e += 4) {
        const float* v = values + s * kVec + e;
        *reinterpret_cast<float4*>(out + Row::column(s) + e) = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
  };
  float* partial = static_cast<float*>(p.workspace) + 2 * int64_t{p.features} * blockIdx.x;
  if constexpr (kRows == 1) {
    write(partial, dweight);
    write(partial + p.features, dbias);
  } else {
    alignas(16) __shared__ float rows[kRows][kThreads * Shape::kValues];
    auto write_sums = [&](float* out, const float (&values)[Shape::kValues]) {
      __syncthreads();
      write(rows[threadIdx.y], values);
      __syncthreads();
      const int thread = threadIdx.y * kThreads + threadIdx.x;
      for (int col = thread; col < p.features; col += kRows * kThreads) {
        float sum = 0.f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum += rows[r][col];
        out[col] = sum;
      }
    };
    write_sums(partial, dweight);
    write_sums(partial + p.features, dbias);
  }
}

constexpr int kPartSlices = 32;

// dweight (blockIdx.y == 0) or dbias from `parts` partial sums. Threads: 32 features x kPartSlices.
template <typename X>
__global__ void __launch_bounds__(32 * kPartSlices)
    reduce_add_layer_norm_grad(const __grid_constant__ AddLayerNormGradParams p, int parts) {
  __shared__ float sums[kPartSlices][32];
  const int col = blockIdx.x * 32 + threadIdx.x;
  const bool inside = col < p.features;
  const float* partial =
      static_cast<const float*>(p.workspace) + int64_t{p.features} * blockIdx.y + col;
  float sum = 0.f;
#pragma unroll 8
  for (int i = threadIdx.y; i < parts; i += kPartSlices) {
    if (inside) sum += partial[2 * int64_t{p.features} * i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;
#pragma unroll
  for (int i = 1; i < kPartSlices; ++i) sum += sums[i][threadIdx.x];
  void* out = blockIdx.y == 0 ? p.dweight : p.dbias;
  if (p.weight_dtype == p.dtype) {
    static_cast<X*>(out)[col] = device::from_float<X>(sum);
  } else {
    static_cast<float*>(out)[col] = sum;
  }
}

}  // namespace pixelfly
