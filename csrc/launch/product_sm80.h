// The mma.sync kernels: every GPU from sm_80 on, every dtype, shape, stride and rank.
#pragma once

#include "pixelfly/launch.h"

namespace pixelfly {

Status launch_product_sm80(const ProductParams& p, const DeviceInfo& device, Stream stream);
Status launch_low_rank_sm80(const LowRankParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
