// The token-stationary Hopper product: serves calls whose contraction fits in shared memory.
#pragma once

#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (shape, strides, block size, rank, device).
bool product_tokens_sm90_supports(const ProductParams& p, const DeviceInfo& device);
Status launch_product_tokens_sm90(const ProductParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
