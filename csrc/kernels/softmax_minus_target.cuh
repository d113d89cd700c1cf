// Cross entropy of rows of logits, and its gradient in their place: loss = log Σ exp(x) -
// x[target], x := softmax(x) - [target].
//
// A thread block takes a row and reads it once: the vectors stay in shared memory for the second
// pass, which needs the sum that the first one forms. Rows that do not fit are read again. Two
// thread blocks of a multiprocessor hide each other's reduction.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "device/approx.cuh"
#include "device/convert.cuh"
#include "device/row_sum.cuh"
#include "device/shared_memory.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

constexpr int kSoftmaxThreads = 512;

template <typename T, bool kResident>
__global__ void __launch_bounds__(kSoftmaxThreads, 2)
    softmax_minus_target(const __grid_constant__ SoftmaxMinusTargetParams p) {
  using Vec = device::Vec16<T>;
  constexpr int kVec = Vec::kSize, kWarps = kSoftmaxThreads / 32;
  constexpr float kLog2E = 1.44269504088896341f;
  __shared__ float shared[2][kWarps];
  const int64_t row = blockIdx.x;
  T* logits = static_cast<T*>(p.logits) + row * p.stride;
  auto* vectors = reinterpret_cast<uint4*>(logits);
  const uint32_t kept = device::smem_address(device::dynamic_shared());
  const int count = p.columns / kVec, whole = p.classes / kVec;
  const int64_t target = p.target[row];
  const bool ignored = target == p.ignore_index;
  const bool valid = target >= 0 && target < p.classes;
  const float chosen = valid ? device::to_float(logits[target]) : NAN;

  // A maximum that is no number keeps exp2 of a row that begins with -inf from being NaN.
  float largest = -FLT_MAX, sum = 0.f;
  auto add = [&](const Vec& v, int used) {
    float top = largest;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (e < used) top = fmaxf(top, v.get(e));
    }
    sum *= device::exp2_approx((largest - top) * kLog2E);
    largest = top;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (e < used) sum += device::exp2_approx((v.get(e) - top) * kLog2E);
    }
  };
#pragma unroll 4
  for (int i = threadIdx.x; i < whole; i += kSoftmaxThreads) {
    Vec v;
    v.raw = __ldcs(vectors + i);
    if (kResident) device::store_shared(kept + i * 16, v.raw);
    add(v, kVec);
  }
  if (threadIdx.x == 0 && whole < count) {  // partly classes, or none at all
    Vec v;
    v.raw = vectors[whole];
    if (kResident) device::store_shared(kept + whole * 16, v.raw);
    add(v, p.classes - whole * kVec);
  }

  // The maximum first, then sums against it.
  float top = largest;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, mask));
  }
  if (threadIdx.x % 32 == 0) shared[0][threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared[0][w]);
  float total[1] = {sum * device::exp2_approx((largest - top) * kLog2E)};
  device::row_sums<kSoftmaxThreads>(total, shared[1]);
  const float log_sum = top + logf(total[0]);
  if (threadIdx.x == 0) p.loss[row] = ignored ? 0.f : log_sum - chosen;
  if (!p.write) return;

  const float offset = -log_sum * kLog2E;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kSoftmaxThreads) {
    Vec v;
    v.raw = {};
    if (i <= whole && !ignored) {
      v.raw = kResident ? device::load_shared_vector(kept + i * 16) : vectors[i];
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        v.set(e, device::exp2_approx(fmaf(v.get(e), kLog2E, offset)));
      }
      // The one element once more, so that it is rounded once.
      if (i == target / kVec || !valid) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          if (!valid) v.set(e, NAN);
          if (i * kVec + e == target) {
            v.set(e, device::exp2_approx(fmaf(chosen, kLog2E, offset)) - 1.f);
          }
        }
      }
      if (i == whole) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          if (i * kVec + e >= p.classes) v.set(e, 0.f);
        }
      }
    }
    vectors[i] = v.raw;
  }
}

}  // namespace pixelfly
