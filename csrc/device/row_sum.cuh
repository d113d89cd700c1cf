// Sums over the threads that share a row: a warp, or a thread block of several.
#pragma once

namespace pixelfly::device {

// Replaces each value by its sum over the row's threads, in an order that never changes. Beyond a
// warp `shared` is room for kCount * kThreads / 32 values that the call before did not use: then
// one barrier a call is enough.
template <int kThreads, int kCount>
__device__ __forceinline__ void row_sums(float (&values)[kCount], float* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
    for (float& value : values) value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[i * kWarps + threadIdx.x / 32] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) values[i] += shared[i * kWarps + w];
    }
  }
}

}  // namespace pixelfly::device
