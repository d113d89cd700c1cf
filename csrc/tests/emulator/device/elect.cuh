// The choice of a warp's thread on the emulator.
#pragma once

#include <cuda_runtime.h>

namespace pixelfly::device {

inline bool elect_one() {
  return __shfl_sync(0xffffffffu, ::emulator::lane(), 0) == ::emulator::lane();
}

}  // namespace pixelfly::device
