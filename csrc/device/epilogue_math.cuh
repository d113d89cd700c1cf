// Activations and their derivatives in fp32, as the epilogues and activation_grad apply them.
#pragma once

#include "pixelfly/dtype.h"

namespace pixelfly::device {

// tanh by the hardware's approximation: absolute error below 2^-10.9, well under a bf16 ulp of the
// products it enters.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// erf by Abramowitz and Stegun 7.1.26, |error| <= 1.5e-7: half the instructions of erff.
__device__ __forceinline__ float erf_approx(float x) {
  const float a = fabsf(x);
  const float t = __fdividef(1.f, fmaf(0.3275911f, a, 1.f));
  float p = fmaf(1.061405429f, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f);
  return copysignf(fmaf(-p * t, __expf(-a * a), 1.f), x);
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kGeluCubic = 0.044715f;

// `kPrecise` is for fp32 storage, where the approximations above would show.
template <Activation kActivation, bool kPrecise>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    return x > 0.f || x != x ? x : 0.f;  // NaN propagates, as in torch
  } else if constexpr (kActivation == Activation::kGelu) {
    const float e = kPrecise ? erff(x * kSqrtHalf) : erf_approx(x * kSqrtHalf);
    return 0.5f * x * (1.f + e);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float inner = kSqrt2OverPi * fmaf(kGeluCubic * x * x, x, x);
    return 0.5f * x * (1.f + (kPrecise ? tanhf(inner) : tanh_approx(inner)));
  } else if constexpr (kActivation == Activation::kSilu) {
    return kPrecise ? x / (1.f + expf(-x)) : x * sigmoid(x);
  } else {
    return x;
  }
}

template <Activation kActivation, bool kPrecise>
__device__ __forceinline__ float derivative(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    return x > 0.f || x != x ? 1.f : 0.f;
  } else if constexpr (kActivation == Activation::kGelu) {
    const float e = kPrecise ? erff(x * kSqrtHalf) : erf_approx(x * kSqrtHalf);
    const float density = kInvSqrt2Pi * (kPrecise ? expf(-0.5f * x * x) : __expf(-0.5f * x * x));
    return fmaf(x, density, 0.5f * (1.f + e));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float square = x * x;
    const float inner = kSqrt2OverPi * fmaf(kGeluCubic * square, x, x);
    const float t = kPrecise ? tanhf(inner) : tanh_approx(inner);
    const float slope = kSqrt2OverPi * fmaf(3.f * kGeluCubic, square, 1.f);
    return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * slope;
  } else if constexpr (kActivation == Activation::kSilu) {
    const float s = kPrecise ? 1.f / (1.f + expf(-x)) : sigmoid(x);
    return s * fmaf(x, 1.f - s, 1.f);
  } else {
    return 1.f;
  }
}

// Calls f(std::integral_constant-like tag) once, with the activation as a compile-time constant, so
// that loops over values hold no switch.
template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};
template <typename F>
__device__ __forceinline__ void dispatch_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kRelu: f(ActivationTag<Activation::kRelu>{}); break;
    case Activation::kGelu: f(ActivationTag<Activation::kGelu>{}); break;
    case Activation::kGeluTanh: f(ActivationTag<Activation::kGeluTanh>{}); break;
    case Activation::kSilu: f(ActivationTag<Activation::kSilu>{}); break;
    default: f(ActivationTag<Activation::kNone>{}); break;
  }
}

}  // namespace pixelfly::device
