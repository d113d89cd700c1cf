// When a kernel lets a dependent one (launch_dependent_kernel) be placed while it still runs.
#pragma once

#include <cstdint>

namespace pixelfly {

// Up to so many tokens, where it saves a microsecond of five to forty. Beyond, thread blocks placed
// as multiprocessors become free no longer lie beside the neighbours that share their tiles: up to
// 8 % more time (csrc/README.md); but where a dense block row makes some work much longer, up to 4
// % less.
constexpr int64_t kEarlyStartTokens = 4096;

}  // namespace pixelfly
