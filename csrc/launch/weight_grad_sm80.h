// The mma.sync weight gradients: every GPU from sm_80 on, every dtype, shape, stride and rank.
#pragma once

#include <cstddef>

#include "pixelfly/launch.h"

namespace pixelfly {

size_t weight_grad_workspace_sm80(const WeightGradParams& p, const DeviceInfo& device);
Status launch_weight_grad_sm80(const WeightGradParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
