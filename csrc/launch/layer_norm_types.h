// The types that LayerNorm's kernels come in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pixelfly/dtype.h"
#include "pixelfly/status.h"

namespace pixelfly {

constexpr int kMaxLayerNormFeatures = 16384;

// The 16-bit type of what lies beside rows of `dtype`: an fp32 stream has one in its branches.
inline DType narrow_dtype(DType dtype, DType delta, DType y) {
  if (dtype != DType::kFloat32) return dtype;
  for (DType other : {delta, y}) {
    if (other != DType::kFloat32) return other;
  }
  return DType::kBFloat16;  // nothing is 16-bit: any kernel serves
}

template <typename Params>
Status check_layer_norm(const Params& p) {
  const DType narrow = narrow_dtype(p.dtype, p.delta_dtype, p.y_dtype);
  auto fits = [&](DType dtype) { return dtype == p.dtype || dtype == narrow; };
  if (!fits(p.delta_dtype) || !fits(p.y_dtype)) {
    return Status::unsupported(
        "delta and y must have x's dtype or, beside a float32 x, one 16-bit dtype");
  }
  if (p.weight_dtype != p.dtype && p.weight_dtype != DType::kFloat32) {
    return Status::unsupported("weight and bias must be float32 or have x's dtype");
  }
  if (p.features % 8 != 0 || p.features < 8 || p.features > kMaxLayerNormFeatures) {
    return Status::unsupported("the last dimension must be a multiple of 8 up to " +
                               std::to_string(kMaxLayerNormFeatures) + ", got " +
                               std::to_string(p.features));
  }
  return Status::success();
}

// Calls f with a value of the stream's type and one of the 16-bit type beside it.
template <typename F>
Status with_layer_norm_types(DType dtype, DType narrow, F f) {
  const bool half = narrow == DType::kFloat16;
  if (dtype == DType::kFloat32) return half ? f(0.f, __half{}) : f(0.f, __nv_bfloat16{});
  return half ? f(__half{}, __half{}) : f(__nv_bfloat16{}, __nv_bfloat16{});
}

}  // namespace pixelfly
