// When a kernel lets a dependent one (launch_dependent_kernel) be placed while it still runs.
#pragma once

#include <cstdint>

#include "pixelfly/schedule.h"

namespace pixelfly {

// Up to so many tokens, where it saves a microsecond of five to forty. Beyond, thread blocks placed
// as multiprocessors become free no longer lie beside the neighbours that share their tiles: up to
// 8 % more time (csrc/README.md).
constexpr int64_t kEarlyStartTokens = 4096;

// Groups of blocks alone from which on it gains even so, 1 to 3 %, unless their rows share all that
// they read of x.
constexpr int32_t kManyGroups = 32;

// A product's. Where a group is dense its thread blocks end later than the others, and products of
// any number of tokens take 1 % more to 4 % less time. With low rank what is placed early forms t,
// or sums weight gradients, which need no neighbours: up to 2 % less of forward and backward. A
// product of blocks alone may be followed by another one.
inline bool product_starts_next_early(int64_t tokens, const PlanHeader& h,
                                      const GroupSection& section) {
  if (tokens <= kEarlyStartTokens || h.rank > 0 || section.dense_groups > 0) return true;
  return section.num_groups >= kManyGroups && section.max_weights < 2 * section.max_steps;
}

}  // namespace pixelfly
