// The Hopper (wgmma + TMA) product kernels.
#pragma once

#include <cstddef>

#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (device, dtype, block size, alignment).
bool product_sm90_supports(const ProductParams& p, const DeviceInfo& device);
// Whether t had better be formed beside the product than before it.
bool product_sm90_forms_t(const ProductParams& p, const DeviceInfo& device);
size_t product_workspace_sm90(const ProductParams& p);  // what that takes
// Forms t beside the product if p.factor_in is given.
Status launch_product_sm90(const ProductParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
