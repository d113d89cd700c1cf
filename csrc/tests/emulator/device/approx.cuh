// The special-function unit's results, exactly, and other functions of one instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pixelfly::device {

inline float tanh_approx(float x) { return std::tanh(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto half = [i](uint32_t pair) {
      const auto bits = static_cast<uint16_t>(pair >> i);
      _Float16 value;
      std::memcpy(&value, &bits, 2);
      return static_cast<double>(value);
    };
    const double sum = half(a) * half(b) + half(c);  // exact
    const auto rounded = static_cast<_Float16>(sum);
    uint16_t bits = 0x7fff;
    if (sum == sum) std::memcpy(&bits, &rounded, 2);
    out |= static_cast<uint32_t>(bits) << i;
  }
  return out;
}
inline float min_nan(float a, float b) { return a < b || a != a ? a : b; }

}  // namespace pixelfly::device
