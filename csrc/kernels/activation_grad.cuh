// dz = dy ⊙ act'(z), elementwise over [T, N], 16 bytes a thread and step.
#pragma once

#include "device/convert.cuh"
#include "device/epilogue_math.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

template <typename T, Activation kActivation>
__global__ void activation_grad(const __grid_constant__ ActivationGradParams p, bool vectors) {
  constexpr int kVec = 16 / sizeof(T);
  constexpr bool kPrecise = sizeof(T) == 4;
  const int64_t per_row = (p.features + kVec - 1) / kVec;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < p.tokens * per_row; i += step) {
    const int64_t row = i / per_row;
    const int col = static_cast<int>(i % per_row) * kVec;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride + col;
    const T* z = static_cast<const T*>(p.z) + row * p.z_stride + col;
    T* dz = static_cast<T*>(p.dz) + row * p.dz_stride + col;
    if (vectors) {
      device::Vec16<T> a, b;
      a.raw = __ldg(reinterpret_cast<const uint4*>(dy));
      b.raw = __ldg(reinterpret_cast<const uint4*>(z));
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        a.set(e, a.get(e) * device::derivative<kActivation, kPrecise>(b.get(e)));
      }
      *reinterpret_cast<uint4*>(dz) = a.raw;
    } else {
      for (int e = 0; e < kVec && col + e < p.features; ++e) {
        const float slope = device::derivative<kActivation, kPrecise>(device::to_float(z[e]));
        dz[e] = device::from_float<T>(device::to_float(dy[e]) * slope);
      }
    }
  }
}

}  // namespace pixelfly
