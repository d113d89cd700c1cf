// Element types and activations shared by the binding, the launchers and the kernels.
#pragma once

#include <cstdint>

namespace pixelfly {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

// The numbering is part of the operator schema: Python passes the integer.
enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kUInt8 ? 1 : 2;
}

// What slopes (act'(z)) are kept in, by the dtype of the tensors around them: bf16's in 8-bit codes
// (device/slope_code.cuh), the others as they are.
constexpr DType slope_dtype(DType dtype) {
  return dtype == DType::kBFloat16 ? DType::kUInt8 : dtype;
}

}  // namespace pixelfly
