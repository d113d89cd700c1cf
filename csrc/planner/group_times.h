// How long row groups take, as the planner expects it.
#pragma once

#include <vector>

#include "planner/plan.h"

namespace pixelfly {

// Time of each group's token tile, in products (.2 us of tensor cores). Loads run beside the
// products: for 8 KB a thread block takes .47 alone (85 GB/s), and longer where all of them ask for
// more than L2 gives. The constants are those that served the measured shapes best.
inline constexpr double kLoad = 0.47, kLoadAtLimit = 0.58;

// Whether all loads together, rather than the thread blocks, set the pace.
bool bound_by_loads(const std::vector<GroupWork>& groups);

// Of an output tile, where 8 KB take `load` to come.
double tile_time(const GroupWork& g, double load, bool saves_slopes);

std::vector<double> tile_times(const std::vector<GroupWork>& groups, bool saves_slopes);

}  // namespace pixelfly
