// Conversions between storage types and fp32, alone and in pairs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace pixelfly::device {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two values in one 32-bit register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float a, float b);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(v);
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float a, float b) {
  const __half2 v = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(v);
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t r);
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t r) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(r));
}
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t r) {
  return __half22float2(reinterpret_cast<const __half2&>(r));
}

// `kCount` values of a storage type (16 or 8 bytes) as fp32 values, and back.
template <typename T, int kCount>
struct Vec {
  static constexpr int kSize = kCount;
  static_assert(kCount * sizeof(T) == 16 || kCount * sizeof(T) == 8, "a vector of 8 or 16 bytes");
  using Raw = std::conditional_t<kCount * sizeof(T) == 16, uint4, uint2>;
  Raw raw;

  __device__ float get(int i) const { return to_float(reinterpret_cast<const T*>(&raw)[i]); }
  __device__ void set(int i, float x) { reinterpret_cast<T*>(&raw)[i] = from_float<T>(x); }
};
template <typename T>
using Vec16 = Vec<T, 16 / static_cast<int>(sizeof(T))>;

}  // namespace pixelfly::device
