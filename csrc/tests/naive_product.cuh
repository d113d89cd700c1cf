// The sums of product_sm90 and low_rank_sm90 by naive kernels, and how far a result is from them.
#pragma once

#include "device/convert.cuh"
#include "device/epilogue_math.cuh"
#include "device/slope_code.cuh"
#include "pixelfly/dtype.h"

namespace pixelfly {

template <typename T>
__global__ void fill(T* p, size_t n, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n;
       i += size_t{gridDim.x} * blockDim.x) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    const float u = (static_cast<uint32_t>(z) + 1.f) * 2.3283064e-10f;
    const float v = static_cast<uint32_t>(z >> 32) * 2.3283064e-10f;
    p[i] = device::from_float<T>(scale * sqrtf(-2.f * logf(fminf(u, 1.f))) * cospif(2.f * v));
  }
}

// Slopes as of an activation: from -0.13 to 1.13.
template <typename Slope>
__global__ void fill_slopes(Slope* p, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n;
       i += size_t{gridDim.x} * blockDim.x) {
    const auto z = static_cast<uint32_t>((i + seed) * 0x9E3779B97F4A7C15ull >> 32);
    p[i] = device::from_float<Slope>(1.26f * 2.3283064e-10f * static_cast<float>(z) - 0.13f);
  }
}

struct Operand {
  const void *x, *blocks, *t, *factor, *bias, *residual, *slope;
  const int *ptr, *idx, *block_of;  // of output rows; block_of null: consecutive
  int in, out, b, rank;
  bool transposed;
  Activation activation;
  int64_t slope_stride;
};

template <typename T>
__global__ void reference(Operand o, float* y, float* slope_out, int64_t first, int64_t tokens) {
  const int n = blockIdx.x * 64 + threadIdx.x;
  const int64_t local = int64_t{blockIdx.y} * 4 + threadIdx.y;
  if (n >= o.out || local >= tokens) return;
  auto at = [](const void* p, int64_t i) { return device::to_float(static_cast<const T*>(p)[i]); };
  const int64_t token = first + local;
  float s = o.bias ? at(o.bias, n) : 0.f;
  for (int q = o.ptr[n / o.b]; q < o.ptr[n / o.b + 1]; ++q) {
    const int64_t block = int64_t{o.block_of ? o.block_of[q] : q} * o.b;
    for (int k = 0; k < o.b && o.idx[q] * o.b + k < o.in; ++k) {
      const int64_t w = o.transposed ? (block + k) * o.b + n % o.b : (block + n % o.b) * o.b + k;
      s += at(o.blocks, w) * at(o.x, token * o.in + o.idx[q] * o.b + k);
    }
  }
  for (int k = 0; k < o.rank; ++k) {
    const int64_t f = o.transposed ? int64_t{k} * o.out + n : int64_t{n} * o.rank + k;
    s += at(o.factor, f) * at(o.t, token * o.rank + k);
  }
  device::dispatch_activation(o.activation, [&](auto tag) {
    const auto [value, slope] = device::activate_with_slope<decltype(tag)::value, true>(s);
    if (slope_out) slope_out[local * o.out + n] = slope;
    s = value;
  });
  if (o.slope) {
    const auto* slope = static_cast<const device::SlopeOf<T>*>(o.slope);
    s *= device::to_float(slope[token * o.slope_stride + n]);
  }
  if (o.residual) s += at(o.residual, token * o.out + n);
  y[local * o.out + n] = s;
}

// t = x · vᵀ (transposed: x · u), rounded to fp32 only.
template <typename T>
__global__ void reference_t(const T* x, const T* factor, int features, int rank, bool transposed,
                            float* t, int64_t tokens) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= tokens * rank) return;
  const int64_t token = i / rank, r = i % rank;
  float s = 0.f;
  for (int64_t k = 0; k < features; ++k) {
    s += device::to_float(x[token * features + k]) *
         device::to_float(factor[transposed ? k * rank + r : r * features + k]);
  }
  t[i] = s;
}

// sums: squared error, squared reference, NaNs, outliers. `got` has rows of `cols`, `stride` apart.
template <typename T>
__global__ void compare(const float* want, const T* got, size_t n, double* sums, size_t cols = 1,
                        size_t stride = 1) {
  double error = 0, norm = 0;
  int nans = 0, outliers = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n;
       i += size_t{gridDim.x} * blockDim.x) {
    const float v = device::to_float(got[i / cols * stride + i % cols]), d = v - want[i];
    if (v != v) {
      ++nans;
      continue;
    }
    error += double(d) * d;
    norm += double(want[i]) * want[i];
    outliers += fabsf(d) > 0.03f + 0.015f * fabsf(want[i]);
  }
  atomicAdd(sums, error);
  atomicAdd(sums + 1, norm);
  if (nans) atomicAdd(sums + 2, double(nans));
  if (outliers) atomicAdd(sums + 3, double(outliers));
}

}  // namespace pixelfly
