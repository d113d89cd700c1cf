// Sums over samples and columns of [samples][features][columns], several tensors in one launch: a
// thread block takes a feature of tensor y of the grid, a warp every eighth of its samples.
#pragma once

#include "device/convert.cuh"
#include "device/row_sum.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

constexpr int kFeatureSumThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kFeatureSumThreads)
    feature_sums(const __grid_constant__ FeatureSumsParams p) {
  using Vec = device::Vec16<T>;
  constexpr int kWarps = kFeatureSumThreads / 32;
  const FeatureSum w = p.sums[blockIdx.y];
  const int64_t feature = blockIdx.x;
  if (feature >= w.features) return;  // all of the block
  __shared__ float shared[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float sum[1] = {0.f};
  for (int64_t sample = warp; sample < w.samples; sample += kWarps) {
    const T* row = static_cast<const T*>(w.x) + (sample * w.features + feature) * w.columns;
#pragma unroll 4
    for (int64_t column = lane * Vec::kSize; column < w.columns; column += 32 * Vec::kSize) {
      Vec values;
      values.raw = __ldg(reinterpret_cast<const uint4*>(row + column));
#pragma unroll
      for (int e = 0; e < Vec::kSize; ++e) sum[0] += values.get(e);
    }
  }
  device::row_sums<kFeatureSumThreads>(sum, shared);
  if (threadIdx.x == 0) w.out[feature] = sum[0];
}

}  // namespace pixelfly
