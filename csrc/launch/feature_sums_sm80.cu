#include <algorithm>

#include "kernels/feature_sums.cuh"
#include "launch/launch_kernel.h"
#include "pixelfly/launch.h"

namespace pixelfly {

Status launch_feature_sums(const FeatureSumsParams& p, const DeviceInfo&, Stream stream) {
  if (p.count < 0 || p.count > kMaxFeatureSums) return Status::unsupported("too many tensors");
  int32_t most = 0;
  for (int i = 0; i < p.count; ++i) {
    if (p.sums[i].columns % 8 != 0) {
      return Status::unsupported("columns must be a multiple of 8, got " +
                                 std::to_string(p.sums[i].columns));
    }
    most = std::max(most, p.sums[i].features);
  }
  if (most == 0) return Status::success();
  const dim3 grid(static_cast<unsigned>(most), static_cast<unsigned>(p.count));
  switch (p.dtype) {
    case DType::kBFloat16:
      return launch_kernel(feature_sums<__nv_bfloat16>, grid, kFeatureSumThreads, 0, stream, p);
    case DType::kFloat16:
      return launch_kernel(feature_sums<__half>, grid, kFeatureSumThreads, 0, stream, p);
    default: return launch_kernel(feature_sums<float>, grid, kFeatureSumThreads, 0, stream, p);
  }
}

}  // namespace pixelfly
