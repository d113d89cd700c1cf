#include "kernels/softmax_minus_target.cuh"
#include "launch/launch_kernel.h"
#include "pixelfly/launch.h"

namespace pixelfly {
namespace {

template <typename T>
Status launch(const SoftmaxMinusTargetParams& p, const DeviceInfo& device, Stream stream) {
  constexpr int kStatic = 1024;  // what the kernel and the system take besides
  const int64_t bytes = int64_t{p.columns} * static_cast<int64_t>(sizeof(T));
  const auto grid = static_cast<unsigned>(p.tokens);
  if (bytes + kStatic > device.max_shared_bytes) {
    return launch_kernel(softmax_minus_target<T, false>, grid, kSoftmaxThreads, 0, stream, p);
  }
  return launch_kernel(softmax_minus_target<T, true>, grid, kSoftmaxThreads,
                       static_cast<int>(bytes), stream, p);
}

}  // namespace

Status launch_softmax_minus_target(const SoftmaxMinusTargetParams& p, const DeviceInfo& device,
                                   Stream stream) {
  if (p.columns % 8 != 0 || p.stride % 8 != 0) {
    return Status::unsupported("rows of logits must be multiples of 8 elements long and apart");
  }
  if (p.classes < 1 || p.classes > p.columns) {
    return Status::unsupported("classes must be between 1 and the columns of logits");
  }
  if (p.tokens > INT32_MAX) return Status::unsupported("more than 2^31 thread blocks");
  if (p.tokens == 0) return Status::success();
  switch (p.dtype) {
    case DType::kBFloat16: return launch<__nv_bfloat16>(p, device, stream);
    case DType::kFloat16: return launch<__half>(p, device, stream);
    default: return Status::unsupported("logits must be bfloat16 or float16");
  }
}

}  // namespace pixelfly
