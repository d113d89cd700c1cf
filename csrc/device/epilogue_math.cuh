// Activations and their derivatives in fp32, as the epilogues and activation_grad apply them.
#pragma once

#include "device/approx.cuh"
#include "pixelfly/dtype.h"

namespace pixelfly::device {

constexpr float kLog2E = 1.44269504088896341f;

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.f + exp2_approx(-kLog2E * x));
}

// The normal distribution's tail P(X > x) for x from 0 to 8: 2 to the power of a polynomial that is
// minimax in max(x, 1) P(X > x), off by at most 2e-7.
__device__ __forceinline__ float normal_tail(float x) {
  float p = fmaf(2.50346745e-5f, x, -6.99170795e-4f);
  p = fmaf(p, x, 7.85382938e-3f);
  p = fmaf(p, x, -5.30703656e-2f);
  p = fmaf(p, x, -4.59014021e-1f);
  p = fmaf(p, x, -1.15112886f);
  return exp2_approx(fmaf(p, x, -9.99999547e-1f));
}
__device__ __forceinline__ float normal_density(float x) {
  constexpr float kLog2InvSqrt2Pi = -1.32574806473616f;
  return exp2_approx(fmaf(x, -0.5f * kLog2E * x, kLog2InvSqrt2Pi));
}

// GELU is x P(X < x) = max(x, 0) - |x| P(X > |x|); past 8 nothing changes.
__device__ __forceinline__ float gelu_size(float x) { return min_nan(fabsf(x), 8.f); }
__device__ __forceinline__ float gelu_value(float x, float size, float tail) {
  return fmaf(-size, tail, fmaxf(x, 0.f));
}

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kGeluCubic = 0.044715f;

struct ValueAndSlope {
  float value, slope;
};

// act(x) and act'(x), which share most of their work. Whoever uses one of them alone pays for that
// one: the compiler drops the rest. `kPrecise` is for fp32 storage, where the approximations above
// would show. NaN propagates, as in torch.
template <Activation kActivation, bool kPrecise>
__device__ __forceinline__ ValueAndSlope activate_with_slope(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    const bool passes = x > 0.f || x != x;
    return {passes ? x : 0.f, passes ? 1.f : 0.f};
  } else if constexpr (kActivation == Activation::kGelu && kPrecise) {
    const float below = 0.5f * (1.f + erff(x * kSqrtHalf));
    return {x * below, fmaf(x, kInvSqrt2Pi * expf(-0.5f * x * x), below)};
  } else if constexpr (kActivation == Activation::kGelu) {
    // The slope at x is one minus that at -x.
    const float size = gelu_size(x), tail = normal_tail(size);
    const float below = fmaf(-size, normal_density(size), tail);
    return {gelu_value(x, size, tail), x > 0.f ? 1.f - below : below};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float square = x * x, half = 0.5f * x;
    const float inner = x * fmaf(kSqrt2OverPi * kGeluCubic, square, kSqrt2OverPi);
    const float t = kPrecise ? tanhf(inner) : tanh_approx(inner);
    const float inner_slope = fmaf(3.f * kSqrt2OverPi * kGeluCubic, square, kSqrt2OverPi);
    return {fmaf(half, t, half), fmaf(half * fmaf(-t, t, 1.f), inner_slope, fmaf(0.5f, t, 0.5f))};
  } else if constexpr (kActivation == Activation::kSilu) {
    const float s = kPrecise ? 1.f / (1.f + expf(-x)) : sigmoid(x), value = x * s;
    return {value, fmaf(value, 1.f - s, s)};
  } else {
    return {x, 1.f};
  }
}

template <Activation kActivation, bool kPrecise>
__device__ __forceinline__ float activate(float x) {
  return activate_with_slope<kActivation, kPrecise>(x).value;
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
