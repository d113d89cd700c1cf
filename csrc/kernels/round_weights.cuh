// Several weights in the dtype of a product, as they lie or in tiles, in one launch: row y of the
// grid takes weight y, a thread 8 elements a step.
#pragma once

#include "device/convert.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

// 8 elements from `source`, zero from `count` on, in vectors where they are whole and aligned.
template <typename Source, typename T>
__device__ __forceinline__ device::Vec16<T> read_weights(const Source* source, int64_t count) {
  constexpr int kVec = device::Vec16<T>::kSize, kPart = device::Vec16<Source>::kSize;
  device::Vec16<T> values;
  if (count >= kVec && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
#pragma unroll
    for (int at = 0; at < kVec; at += kPart) {
      device::Vec16<Source> part;
      part.raw = __ldg(reinterpret_cast<const uint4*>(source + at));
#pragma unroll
      for (int e = 0; e < kPart; ++e) values.set(at + e, part.get(e));
    }
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      values.set(e, e < count ? device::to_float(source[e]) : 0.f);
    }
  }
  return values;
}

template <typename T>
__global__ void __launch_bounds__(256) round_weights(const __grid_constant__ RoundWeightsParams p) {
  constexpr int kVec = device::Vec16<T>::kSize;
  const RoundedWeight w = p.weights[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kVec;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVec; i < w.size;
       i += step) {
    int64_t from = i, count = w.size - i;
    if (w.tile > 0) {
      // 8 elements lie in one row of a tile.
      const int64_t tile = i / (w.tile * w.tile), inside = i % (w.tile * w.tile);
      const int64_t across = (w.columns + w.tile - 1) / w.tile;
      const int64_t row = tile / across * w.tile + inside / w.tile;
      const int64_t column = tile % across * w.tile + inside % w.tile;
      from = row * w.columns + column;
      count = row < w.rows ? w.columns - column : 0;
    }
    // Nothing to read: not even a pointer past the end is made.
    if (count <= 0) from = 0;
    const device::Vec16<T> values =
        w.wide ? read_weights<float, T>(static_cast<const float*>(w.source) + from, count)
               : read_weights<T, T>(static_cast<const T*>(w.source) + from, count);
    T* target = static_cast<T*>(w.target) + i;
    if (i + kVec <= w.size) {
      *reinterpret_cast<uint4*>(target) = values.raw;
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (i + e < w.size) target[e] = device::from_float<T>(values.get(e));
      }
    }
  }
}

}  // namespace pixelfly
