#include <algorithm>

#include "kernels/round_weights.cuh"
#include "launch/launch_kernel.h"
#include "pixelfly/launch.h"

namespace pixelfly {

Status launch_round_weights(const RoundWeightsParams& p, const DeviceInfo& device, Stream stream) {
  constexpr int kThreads = 256, kVec = 8;
  if (p.count < 0 || p.count > kMaxRoundedWeights) return Status::unsupported("too many weights");
  int64_t most = 0;
  for (int i = 0; i < p.count; ++i) {
    if (p.weights[i].tile % kVec != 0) return Status::unsupported("tiles must be multiples of 8");
    most = std::max(most, p.weights[i].size);
  }
  if (most == 0) return Status::success();
  constexpr int64_t kPerBlock = kThreads * kVec;
  const int64_t blocks =
      std::min<int64_t>((most + kPerBlock - 1) / kPerBlock, 8LL * device.num_sms);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.count));
  switch (p.dtype) {
    case DType::kBFloat16:
      return launch_kernel(round_weights<__nv_bfloat16>, grid, kThreads, 0, stream, p);
    case DType::kFloat16: return launch_kernel(round_weights<__half>, grid, kThreads, 0, stream, p);
    default: return Status::unsupported("weights are rounded to bfloat16 or float16");
  }
}

}  // namespace pixelfly
