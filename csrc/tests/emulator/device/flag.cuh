// Flags in global memory on the emulator, where kernels run one after another.
#pragma once

#include <cuda_runtime.h>

namespace pixelfly::device {

inline void raise_flag(int* flag) { *flag = 1; }
inline bool flag_is_up(const int* flag) { return *flag == 1; }
inline void wait_for_flag(const int* flag, bool) {
  emulator::wait_until([flag] { return *flag == 1; }, "a flag");
}

}  // namespace pixelfly::device
