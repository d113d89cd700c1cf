// The Hopper (wgmma + TMA) product kernel for few tokens.
#pragma once

#include "launch/heuristics.h"
#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (device, dtype, block size, alignment).
bool product_split_sm90_supports(const ProductParams& p, const DeviceInfo& device);
Status launch_product_split_sm90(const ProductParams& p, const SplitTile& tile,
                                 const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
