// Launcher of kernels/product_few_sm80.cuh.
#pragma once

#include "pixelfly/launch.h"

namespace pixelfly {

bool product_few_sm80_supports(const ProductParams& p);
Status launch_product_few_sm80(const ProductParams& p, const DeviceInfo& device, Stream stream);

// Whether it is quicker than the kernels for more tokens: up to `always` tokens; beyond, every 64
// tokens read the weights again, which pays for narrow outputs.
constexpr int64_t kFewTokens = 64;
bool few_tokens_are_quick(int64_t tokens, int32_t outputs, const DeviceInfo& device,
                          int64_t always = kFewTokens);

bool low_rank_few_sm80_supports(const LowRankParams& p);
Status launch_low_rank_few_sm80(const LowRankParams& p, const DeviceInfo& device, Stream stream);

}  // namespace pixelfly
