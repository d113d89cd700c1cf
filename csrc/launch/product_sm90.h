// The Hopper (wgmma + TMA) product kernels.
#pragma once

#include <cstddef>

#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (device, dtype, block size, alignment).
bool product_sm90_supports(const ProductParams& p, const DeviceInfo& device);
Status launch_product_sm90(const ProductParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
