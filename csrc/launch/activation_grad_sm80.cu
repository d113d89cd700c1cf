#include <algorithm>

#include "kernels/activation_grad.cuh"
#include "launch/alignment.h"
#include "launch/launch_kernel.h"
#include "pixelfly/launch.h"

namespace pixelfly {
namespace {

template <typename T, typename Slope, bool kRelu>
Status launch(const ActivationGradParams& p, const DeviceInfo& device, Stream stream) {
  constexpr int kThreads = 256, kVec = 16 / sizeof(T);
  const bool vectors = p.features % kVec == 0 && aligned_rows(p.dy, p.dy_stride, p.dtype) &&
                       aligned_rows(p.slope, p.slope_stride, p.slope_dtype) &&
                       aligned_rows(p.dz, p.dz_stride, p.dtype);
  const int64_t work = p.tokens * ((p.features + kVec - 1) / kVec);
  const int64_t grid = std::min<int64_t>((work + kThreads - 1) / kThreads, 32LL * device.num_sms);
  return launch_kernel(activation_grad<T, Slope, kRelu>, static_cast<unsigned>(grid), kThreads, 0,
                       stream, p, vectors);
}

template <typename T>
Status launch_dtype(const ActivationGradParams& p, const DeviceInfo& device, Stream stream) {
  using Slope = device::SlopeOf<T>;
  if (p.slope_dtype == slope_dtype(p.dtype)) {
    return p.relu ? launch<T, Slope, true>(p, device, stream)
                  : launch<T, Slope, false>(p, device, stream);
  }
  if (p.relu && p.slope_dtype == p.dtype) return launch<T, T, true>(p, device, stream);
  return Status::unsupported("activation_grad: slopes of another dtype than are saved");
}

}  // namespace

Status launch_activation_grad(const ActivationGradParams& p, const DeviceInfo& device,
                              Stream stream) {
  if (p.tokens == 0) return Status::success();
  switch (p.dtype) {
    case DType::kBFloat16: return launch_dtype<__nv_bfloat16>(p, device, stream);
    case DType::kFloat16: return launch_dtype<__half>(p, device, stream);
    default: return launch_dtype<float>(p, device, stream);
  }
}

}  // namespace pixelfly
