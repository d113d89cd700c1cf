// The Hopper (wgmma + TMA) weight grad kernels.
#pragma once

#include <cstddef>

#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (device, dtype, block size, alignment).
bool weight_grad_sm90_supports(const WeightGradParams& p, const DeviceInfo& device);
Status launch_weight_grad_sm90(const WeightGradParams& p, const DeviceInfo& device, Stream stream);
size_t weight_grad_workspace_sm90(const WeightGradParams& p, const DeviceInfo& device);

}  // namespace pixelfly
