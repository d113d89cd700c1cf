// The part of CUDA's language and runtime that the kernels and launchers use, for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __CUDA_ARCH_FEAT_SM90_ALL 1

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct int4 {
  int x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Four bytes of the eight of a (the low ones) and b, by the nibbles of `selector`.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) {
    out |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return out;
}

inline void __syncthreads() {
  const auto& size = blockDim;
  ::emulator::named_sync(0, static_cast<int>(size.x * size.y * size.z));
}
inline void __threadfence() {}
inline void __syncwarp() { ::emulator::warp_exchange({}); }
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return static_cast<T>(
      ::emulator::warp_exchange({static_cast<uint32_t>(value)})[static_cast<size_t>(source)][0]);
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto& given = ::emulator::warp_exchange({bits});
  std::memcpy(&value, &given[static_cast<size_t>(::emulator::lane() ^ mask)][0], 4);
  return value;
}

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int mask) {
  return ::emulator::warp_exchange({value})[static_cast<size_t>(::emulator::lane() ^ mask)][0];
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  const auto& given = ::emulator::warp_exchange({predicate != 0 ? 1u : 0u});
  unsigned bits = 0;
  for (size_t lane = 0; lane < given.size(); ++lane) bits |= given[lane][0] << lane;
  return bits;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
struct CUstream_st;
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, CUstream_st*) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
