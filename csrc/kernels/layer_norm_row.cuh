// How the LayerNorm kernels hold a row: kThreads threads with kValues values each, as vectors that
// lie side by side among the threads. A vector is 16 bytes of X, the stream's type. What is beside
// an fp32 stream in 16 bits moves as 8 bytes then, so that every access of a warp is one run.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/convert.cuh"

namespace pixelfly {

template <typename X, int kThreads, int kValues>
struct RowTile {
  static constexpr int kVec = 16 / static_cast<int>(sizeof(X));
  static constexpr int kSteps = kValues / kVec;
  template <typename T>
  using Vec = device::Vec<T, kVec>;

  static __device__ int column(int step) { return (step * kThreads + threadIdx.x) * kVec; }

  // Nobody reads these rows again soon: the outputs may have their place in L2.
  template <typename T>
  static __device__ Vec<T> load(const void* data, int64_t at) {
    Vec<T> v;
    v.raw = __ldcs(reinterpret_cast<const typename Vec<T>::Raw*>(static_cast<const T*>(data) + at));
    return v;
  }
  template <typename T>
  static __device__ void store(void* data, int64_t at, const Vec<T>& v) {
    *reinterpret_cast<typename Vec<T>::Raw*>(static_cast<T*>(data) + at) = v.raw;
  }
  // Of weight or bias, which are fp32 or X.
  static __device__ void load_weights(const void* data, bool is_x, int col, float (&out)[kVec]) {
    if (is_x) {
      Vec<X> v;
      v.raw =
          __ldg(reinterpret_cast<const typename Vec<X>::Raw*>(static_cast<const X*>(data) + col));
#pragma unroll
      for (int e = 0; e < kVec; ++e) out[e] = v.get(e);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; e += 4) {
        const auto* at = reinterpret_cast<const float4*>(static_cast<const float*>(data) + col + e);
        const float4 v = __ldg(at);
        out[e] = v.x;
        out[e + 1] = v.y;
        out[e + 2] = v.z;
        out[e + 3] = v.w;
      }
    }
  }
};

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls f with the tag of X or of Narrow, which a branch of the network may be in.
template <typename X, typename Narrow, typename F>
__device__ __forceinline__ void with_type(bool is_x, F f) {
  if (std::is_same_v<X, Narrow> || is_x) {
    f(TypeTag<X>{});
  } else {
    f(TypeTag<Narrow>{});
  }
}

}  // namespace pixelfly
