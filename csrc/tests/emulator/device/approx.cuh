// The special-function unit's results, exactly, and min.NaN.
#pragma once

#include <cmath>

namespace pixelfly::device {

inline float tanh_approx(float x) { return std::tanh(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float min_nan(float a, float b) { return a < b || a != a ? a : b; }

}  // namespace pixelfly::device
