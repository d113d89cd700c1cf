// The Hopper (wgmma + TMA) low-rank product t = x · vᵀ.
#pragma once

#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (device, dtype, alignment).
bool low_rank_sm90_supports(const LowRankParams& p, const DeviceInfo& device);
Status launch_low_rank_sm90(const LowRankParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
