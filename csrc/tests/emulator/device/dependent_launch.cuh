// Kernels of the emulator run one after another.
#pragma once

namespace pixelfly::device {

inline void allow_dependent_launch() {}
inline void wait_for_previous_kernel() {}
inline void prefetch_before_wait(const void*) {}

}  // namespace pixelfly::device
