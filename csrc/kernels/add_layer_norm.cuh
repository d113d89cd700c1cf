// h = x + delta, y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias, by rows [T, C].
//
// A row is read once: its values stay in registers for the sum, for the sum of squared differences
// from the mean, and for y. Up to 1024 features a warp takes a row and meets nobody; beyond that a
// thread block does. One row a warp or thread block, and no loop over rows: several of them wait
// for memory on a multiprocessor at any moment, and the hardware deals the rest evenly.
#pragma once

#include "device/row_sum.cuh"
#include "kernels/layer_norm_row.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

template <typename X, typename Narrow, int kThreads, int kValues>
__global__ void __launch_bounds__(kThreads < 128 ? 128 : kThreads, kThreads < 512 ? 5 : 1)
    add_layer_norm(const __grid_constant__ AddLayerNormParams p) {
  using Row = RowTile<X, kThreads, kValues>;
  constexpr int kVec = Row::kVec, kSteps = Row::kSteps;
  __shared__ float shared[2][kThreads / 32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.tokens) return;  // a whole warp: thread blocks of one row have one
  const int64_t at = row * p.features;
  auto inside = [&](int step) { return Row::column(step) < p.features; };

  typename Row::template Vec<X> h[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    h[s].raw = {};
    if (inside(s)) h[s] = Row::template load<X>(p.x, at + Row::column(s));
  }
  if (p.delta != nullptr) {
    with_type<X, Narrow>(p.delta_dtype == p.dtype, [&](auto tag) {
      using Delta = typename decltype(tag)::Type;
      typename Row::template Vec<Delta> delta[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        delta[s].raw = {};
        if (inside(s)) delta[s] = Row::template load<Delta>(p.delta, at + Row::column(s));
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) h[s].set(e, h[s].get(e) + delta[s].get(e));
        if (inside(s)) Row::template store<X>(p.h, at + Row::column(s), h[s]);
      }
    });
  }

  const float share = 1.f / static_cast<float>(p.features);
  float sum[1] = {0.f};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum[0] += h[s].get(e);
  }
  device::row_sums<kThreads>(sum, shared[0]);
  const float mean = sum[0] * share;
  float squares[1] = {0.f};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const float centred = inside(s) ? h[s].get(e) - mean : 0.f;
      squares[0] = fmaf(centred, centred, squares[0]);
    }
  }
  device::row_sums<kThreads>(squares, shared[1]);
  const float rstd = 1.f / sqrtf(squares[0] * share + p.eps);
  if (threadIdx.x == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }

  with_type<X, Narrow>(p.y_dtype == p.dtype, [&](auto tag) {
    using Y = typename decltype(tag)::Type;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (!inside(s)) continue;
      float weight[kVec], bias[kVec];
      Row::load_weights(p.weight, p.weight_dtype == p.dtype, Row::column(s), weight);
      Row::load_weights(p.bias, p.weight_dtype == p.dtype, Row::column(s), bias);
      typename Row::template Vec<Y> y;
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        y.set(e, fmaf((h[s].get(e) - mean) * rstd, weight[e], bias[e]));
      }
      Row::template store<Y>(p.y, at + Row::column(s), y);
    }
  });
}

}  // namespace pixelfly
