// dz = dy ⊙ act'(z), elementwise over [T, N], 16 bytes a thread and step. The slope act'(z) is
// given, in the storage type Slope; ReLU's may be any tensor that is positive where z is.
#pragma once

#include "device/convert.cuh"
#include "device/slope_code.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

template <typename T, typename Slope, bool kRelu>
__global__ void activation_grad(const __grid_constant__ ActivationGradParams p, bool vectors) {
  constexpr int kVec = 16 / sizeof(T);
  auto scaled = [](float dy, float slope) {
    return kRelu ? (slope > 0.f || slope != slope ? dy : 0.f) : dy * slope;
  };
  const int64_t per_row = (p.features + kVec - 1) / kVec;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < p.tokens * per_row; i += step) {
    const int64_t row = i / per_row;
    const int col = static_cast<int>(i % per_row) * kVec;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride + col;
    const Slope* slope = static_cast<const Slope*>(p.slope) + row * p.slope_stride + col;
    T* dz = static_cast<T*>(p.dz) + row * p.dz_stride + col;
    if (vectors) {
      using Slopes = device::Vec<Slope, kVec>;
      device::Vec16<T> a;
      Slopes b;
      a.raw = __ldg(reinterpret_cast<const uint4*>(dy));
      b.raw = __ldg(reinterpret_cast<const typename Slopes::Raw*>(slope));
#pragma unroll
      for (int e = 0; e < kVec; ++e) a.set(e, scaled(a.get(e), b.get(e)));
      *reinterpret_cast<uint4*>(dz) = a.raw;
    } else {
      for (int e = 0; e < kVec && col + e < p.features; ++e) {
        dz[e] = device::from_float<T>(scaled(device::to_float(dy[e]), device::to_float(slope[e])));
      }
    }
  }
}

}  // namespace pixelfly
