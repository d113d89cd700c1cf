// When a kernel lets a dependent one (launch_dependent_kernel) be placed while it still runs.
#pragma once

#include <cstdint>

namespace pixelfly {

// Up to so many tokens, where it saves a microsecond of five to forty. Beyond, thread blocks that
// come to whichever multiprocessor is free no longer lie as those do that a whole GPU is dealt to:
// up to 6 % more time where they share tiles (csrc/README.md).
constexpr int64_t kEarlyStartTokens = 4096;

}  // namespace pixelfly
