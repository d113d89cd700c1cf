// Argument checks and conversions between torch tensors and launch parameters.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "pixelfly/launch.h"

namespace pixelfly {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_string(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (int64_t size : shape) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + "]";
}
inline std::string shape_string(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape_string(shape);
}

inline void raise_if_error(const Status& status, const char* op) {
  STD_TORCH_CHECK(status.ok(), op, ": ", status.message);
}

inline DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, op,
                  ": the CUDA kernels expect float32, bfloat16 or float16; got another dtype "
                  "(float64 runs on the CPU)");
  return DType::kFloat32;
}

// torch's number of a tensor's dtype, for comparing and passing on: making a ScalarType of it asks
// torch for the number of one dtype after another.
inline int32_t dtype_number(const Tensor& t) {
  int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  return number;
}

// Checks where one operand is and how it lies against another: same device, the shape given,
// contiguous last dimension.
inline void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& other,
                       std::initializer_list<int64_t> shape) {
  const int32_t device = other.get_device_index();
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, op, ": ", name,
                  " must be on the other operands' device (cuda:", device, ")");
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op, ": ",
                  name, " must have shape ", shape_string(shape), ", got ", shape_string(t));
  const auto last = static_cast<int64_t>(shape.size()) - 1;
  STD_TORCH_CHECK(sizes[last] <= 1 || t.stride(last) == 1, op, ": ", name,
                  " must be contiguous in its last dimension");
}

// The same of what the kernels compute with.
inline int32_t number_of(DType dtype) {
  return dtype == DType::kFloat32    ? aoti_torch_dtype_float32()
         : dtype == DType::kBFloat16 ? aoti_torch_dtype_bfloat16()
                                     : aoti_torch_dtype_float16();
}

inline DType kernel_dtype(ScalarType dtype, const char* op, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
  return DType::kFloat32;
}

// Checks one operand against another, which may be itself: the same, and the same dtype.
inline void check_operand(const char* op, const char* name, const Tensor& t, const Tensor& other,
                          std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(dtype_number(t) == dtype_number(other), op, ": ", name,
                  " must have the other operands' dtype");
  check_rows(op, name, t, other, shape);
}

// Checks a slope for a gradient of `dtype`: as pixelfly::forward saves it, or the layer's output
// where `or_output`. Returns its dtype.
inline DType check_slope(const char* op, const char* name, const Tensor& t, const Tensor& gradient,
                         DType dtype, bool or_output, std::initializer_list<int64_t> shape) {
  check_rows(op, name, t, gradient, shape);
  const int32_t number = dtype_number(t);
  if (slope_dtype(dtype) == DType::kUInt8 && number == aoti_torch_dtype_uint8()) {
    return DType::kUInt8;
  }
  STD_TORCH_CHECK(slope_dtype(dtype) == dtype || or_output, op, ": ", name,
                  " must be uint8, as pixelfly::forward saves it for bfloat16");
  STD_TORCH_CHECK(number == dtype_number(gradient), op, ": ", name, " must have dy's dtype",
                  slope_dtype(dtype) == dtype ? "" : " or be uint8");
  return dtype;
}

// The header travels as decimal integers in a string: a list of integers is converted one by one,
// three times, on its way from Python to here. A thread takes every text apart once: there are as
// many as layouts and ranks.
inline const PlanHeader& header_of(const std::string& text, const char* op) {
  thread_local std::unordered_map<std::string, PlanHeader> known;
  const auto found = known.find(text);
  if (found != known.end()) return found->second;
  int32_t raw[kPlanHeaderSize];
  const char *at = text.data(), *end = at + text.size();
  int count = 0;
  for (; at < end && count < kPlanHeaderSize; ++count) {
    const auto [next, error] = std::from_chars(at, end, raw[count]);
    if (error != std::errc()) break;
    at = next + (next < end);  // the space
  }
  STD_TORCH_CHECK(at == end && count == kPlanHeaderSize, op, ": header must hold ", kPlanHeaderSize,
                  " integers, got '", text, "'");
  PlanHeader header;
  std::memcpy(&header, raw, sizeof(header));
  STD_TORCH_CHECK(header.magic == kPlanMagic && header.version == kPlanVersion, op,
                  ": header was not written by this version's planner");
  return known[text] = header;
}

inline const PlanHeader& parse_header(const std::string& text, const Tensor& plan, const char* op) {
  const PlanHeader& header = header_of(text, op);
  STD_TORCH_CHECK(plan.is_cuda() && dtype_number(plan) == aoti_torch_dtype_int32() &&
                      plan.numel() == header.size && plan.is_contiguous(),
                  op, ": plan must be a contiguous int32 CUDA tensor of ", header.size,
                  " elements, got ", plan.numel());
  return header;
}

// Data pointer and row stride of an optional matrix; a vector's stride is irrelevant.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};
inline Matrix matrix(const Tensor& t) {
  if (t.numel() == 0) return {};
  return {t.data_ptr(), t.dim() == 2 ? t.stride(0) : 0};
}
inline Matrix matrix(const OptionalTensor& t) { return t.has_value() ? matrix(*t) : Matrix{}; }

// An uninitialised contiguous tensor on x's device. Straight through the C interface:
// torch::stable::new_empty goes through the dispatcher with boxed arguments.
inline Tensor empty(const Tensor& x, std::initializer_list<int64_t> shape, int32_t dtype) {
  int64_t strides[4] = {1, 1, 1, 1};
  const int64_t* size = shape.begin();
  for (auto d = static_cast<int>(shape.size()) - 2; d >= 0; --d) {
    strides[d] = strides[d + 1] * std::max<int64_t>(size[d + 1], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), size, strides,
                                                  dtype, aoti_torch_device_type_cuda(),
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty(const Tensor& x, std::initializer_list<int64_t> shape) {
  return empty(x, shape, dtype_number(x));
}

// A workspace on x's device; none if nothing needs one.
inline OptionalTensor empty_bytes(const Tensor& x, size_t bytes) {
  if (bytes == 0) return {};
  return empty(x, {static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8());
}

// A contiguous tensor of x's shape, which is contiguous too.
inline Tensor empty_beside(const Tensor& x, DType dtype) {
  const auto sizes = x.sizes(), strides = x.strides();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(),
                                                  number_of(dtype), aoti_torch_device_type_cuda(),
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

// A [rows, cols] tensor on x's device whose row stride is a multiple of some elements.
inline Tensor padded_rows(const Tensor& x, int64_t rows, int64_t cols, int32_t dtype,
                          int64_t multiple) {
  if (cols % multiple == 0) return empty(x, {rows, cols}, dtype);
  Tensor full = empty(x, {rows, (cols + multiple - 1) / multiple * multiple}, dtype);
  return torch::stable::narrow(full, 1, 0, cols);
}
// The same like x, with rows that kernels can read as 16-byte vectors.
inline Tensor padded_rows(const Tensor& x, int64_t rows, int64_t cols) {
  return padded_rows(x, rows, cols, dtype_number(x), x.element_size() == 1 ? 16 : 8);
}

// An uninitialised slope of a layer's output, as `pixelfly/ops/activations.py` makes it.
inline Tensor empty_slope(const Tensor& x, DType dtype, int64_t rows, int64_t cols) {
  if (slope_dtype(dtype) == dtype) return empty(x, {rows, cols});
  return padded_rows(x, rows, cols, aoti_torch_dtype_uint8(), 16);
}

// The tensor itself if it starts at, and its rows are, multiples of 16 bytes; else a copy that
// does. Slices of wider tensors and views into flat parameters may start anywhere; kernels read
// vectors.
inline Tensor aligned(const Tensor& t) {
  const bool start = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  const bool rows = t.dim() != 2 || t.stride(0) * static_cast<int64_t>(t.element_size()) % 16 == 0;
  if (t.numel() == 0 || (start && rows)) return t;
  Tensor copy = t.dim() == 2 ? padded_rows(t, t.size(0), t.size(1)) : torch::stable::empty_like(t);
  return torch::stable::copy_(copy, t);
}
inline OptionalTensor aligned(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(aligned(*t)) : t;
}

inline DeviceInfo device_of(const Tensor& x, const char* op) {
  DeviceInfo info;
  raise_if_error(device_info(x.get_device_index(), &info), op);
  STD_TORCH_CHECK(info.arch >= 80, op, ": needs a GPU of compute capability 8.0 or newer, got ",
                  info.arch / 10, ".", info.arch % 10);
  return info;
}

}  // namespace pixelfly
