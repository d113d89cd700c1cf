// The Hopper (wgmma + TMA) low-rank product t = x · vᵀ.
#pragma once

#include "pixelfly/launch.h"

namespace pixelfly {

// True if the kernel can serve the call (device, dtype, alignment).
bool low_rank_sm90_supports(const LowRankParams& p, const DeviceInfo& device);
// How many thread blocks share a tile's features; 1: each takes all of them.
int low_rank_cluster(const LowRankParams& p, const DeviceInfo& device);
Status launch_low_rank_sm90(const LowRankParams& p, const DeviceInfo& device, Stream stream);
// t in tiles of 128 tokens by `thread_blocks` thread blocks, each tile with a flag in `ready`, for
// a dependent kernel that runs beside this one. Ranks of up to 64.
Status launch_low_rank_ahead_sm90(const LowRankParams& p, const DeviceInfo& device,
                                  int thread_blocks, int32_t* ready, Stream stream);

}  // namespace pixelfly
