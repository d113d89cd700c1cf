// Launcher of kernels/product_few_sm80.cuh.
#pragma once

#include "pixelfly/launch.h"

namespace pixelfly {

bool product_few_sm80_supports(const ProductParams& p);
Status launch_product_few_sm80(const ProductParams& p, const DeviceInfo& device, Stream stream);

bool low_rank_few_sm80_supports(const LowRankParams& p);
Status launch_low_rank_few_sm80(const LowRankParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
