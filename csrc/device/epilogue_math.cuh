// Activations and their derivatives in fp32, as the epilogues and activation_grad apply them.
#pragma once

#include "device/approx.cuh"
#include "pixelfly/dtype.h"

namespace pixelfly::device {

constexpr float kLog2E = 1.44269504088896341f;

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.f + exp2_approx(-kLog2E * x));
}

// The normal distribution's tail P(X > |x|), absolute error below 1e-7 (erf by Abramowitz and
// Stegun 7.1.26), and exp(-x^2 / 2), which is a factor of it.
struct NormalTail {
  float tail;
  float bell;
};
__device__ __forceinline__ NormalTail normal_tail(float x) {
  const float t = reciprocal(fmaf(0.3275911f * 0.70710678f, fabsf(x), 1.f));
  float p = fmaf(0.5f * 1.061405429f, t, 0.5f * -1.453152027f);
  p = fmaf(p, t, 0.5f * 1.421413741f);
  p = fmaf(p, t, 0.5f * -0.284496736f);
  p = fmaf(p, t, 0.5f * 0.254829592f);
  const float bell = exp2_approx(x * (-0.5f * kLog2E * x));
  return {p * t * bell, bell};
}

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
    if constexpr (kPrecise) return 0.5f * x * (1.f + erff(x * kSqrtHalf));
    // x P(X < x) = max(x, 0) - |x| P(X > |x|). The sum is max(x, 0) that keeps NaN, and the bound
    // keeps infinity times zero away.
    return fmaf(-fminf(fabsf(x), 1e4f), normal_tail(x).tail, 0.5f * (x + fabsf(x)));
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
    if constexpr (kPrecise) {
      return fmaf(x, kInvSqrt2Pi * expf(-0.5f * x * x), 0.5f * (1.f + erff(x * kSqrtHalf)));
    }
    const NormalTail n = normal_tail(x);
    return fmaf(x, kInvSqrt2Pi * n.bell, x > 0.f ? 1.f - n.tail : n.tail);
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
