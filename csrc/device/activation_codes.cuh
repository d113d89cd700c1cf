// act(x) and the code of act'(x) (device/slope_code.cuh), two values at a time.
#pragma once

#include "device/epilogue_math.cuh"
#include "device/slope_code.cuh"

namespace pixelfly::device {

// The codes of GELU's slopes at two values, from s = min(|x|, 8) and the normal tail there, in
// fp16: .14 of a code off at most. No exp2 of its own, and fewer instructions than in fp32.
//
// Below zero the slope is tail (1 - s hazard(s)), of which the parenthesis is nearly a cubic; at
// -x it is one minus that. So a half less the former, with x's sign, is the slope less a half.
__device__ __forceinline__ uint32_t gelu_slope_codes(const float (&x)[2], const float (&s)[2],
                                                     const float (&tail)[2]) {
  // The cubic 0.9995 - 0.7843 s - 0.6862 s^2 - 0.0543 s^3, negative; 0.5; 200; 1024 + 26 + 100.
  constexpr uint32_t kCubic = 0x2af22af2, kSquare = 0x397d397d, kLinear = 0x3a463a46,
                     kOne = 0xbbffbbff, kHalf = 0x38003800, kScale = 0x5a405a40,
                     kOffset = 0x647e647e, kSigns = 0x80008000;
  const uint32_t size = pack2<__half>(s[0], s[1]);
  uint32_t y = fma_half2(size, kCubic, kSquare);
  y = fma_half2(y, size, kLinear);
  y = fma_half2(y, size, kOne);
  y = fma_half2(pack2<__half>(tail[0], tail[1]), y, kHalf);
  y ^= __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x7632) & kSigns;
  return fma_half2(y, kScale, kOffset);
}

// Replaces both values by their activation and returns the codes of the slopes there, as
// encode_slopes() does.
template <Activation kActivation>
__device__ __forceinline__ uint32_t activate_with_codes(float& a, float& b) {
  if constexpr (kActivation == Activation::kGelu) {
    const float x[2] = {a, b}, s[2] = {gelu_size(a), gelu_size(b)};
    const float tail[2] = {normal_tail(s[0]), normal_tail(s[1])};
    a = gelu_value(a, s[0], tail[0]);
    b = gelu_value(b, s[1], tail[1]);
    return gelu_slope_codes(x, s, tail);
  } else {
    const auto p = activate_with_slope<kActivation, false>(a);
    const auto q = activate_with_slope<kActivation, false>(b);
    a = p.value;
    b = q.value;
    return encode_slopes(p.slope, q.slope);
  }
}

}  // namespace pixelfly::device
