// The Hopper (wgmma + TMA) product kernel for layers of few outputs, which forms t on the way.
#pragma once

#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (device, dtype, layout, epilogue, alignment).
bool product_all_rows_sm90_supports(const ProductParams& p, const DeviceInfo& device);
Status launch_product_all_rows_sm90(const ProductParams& p, const DeviceInfo& device,
                                    Stream stream);

}  // namespace pixelfly
