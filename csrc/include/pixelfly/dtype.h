// Element types and activations shared by the binding, the launchers and the kernels.
#pragma once

#include <cstdint>

namespace pixelfly {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The numbering is part of the operator schema: Python passes the integer.
enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace pixelfly
