// Four neighbouring outputs of a token, which a thread of the kernels for few tokens finishes.
#pragma once

#include "device/convert.cuh"
#include "device/epilogue_math.cuh"
#include "device/slope_code.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

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

// Stores what becomes of their sums z (with the bias): y and perhaps its slopes, or dx, which
// `slopes` multiply if there are any.
template <typename T, bool kTransposed, Activation kActivation>
__device__ __forceinline__ void finish_four(const ProductParams& p, const Four<float>& z,
                                            Four<device::SlopeOf<T>> slopes,
                                            const Four<T>& residual, int token, int n, int count,
                                            bool whole) {
  using Slope = device::SlopeOf<T>;
  Four<T> y;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if constexpr (kTransposed) {
      const float slope = p.slope != nullptr ? device::to_float(slopes.of[e]) : 1.f;
      y.of[e] = device::from_float<T>(z.of[e] * slope);
      continue;
    }
    const auto [value, slope] = device::activate_with_slope<kActivation, false>(z.of[e]);
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

}  // namespace pixelfly
