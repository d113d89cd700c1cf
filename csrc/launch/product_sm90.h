// The Hopper (wgmma + TMA) product kernels.
#pragma once

#include <cstddef>

#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (device, dtype, block size, alignment).
bool product_sm90_supports(const ProductParams& p, const DeviceInfo& device);
// Whether launch_product_sm90() forms t itself, given a workspace.
bool product_sm90_forms_t(const ProductParams& p, const DeviceInfo& device);
size_t product_workspace_sm90(const ProductParams& p, const DeviceInfo& device);
Status launch_product_sm90(const ProductParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
