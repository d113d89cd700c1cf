// One thread of a warp.
#pragma once

#include <cstdint>

namespace pixelfly::device {

// True in one thread of a warp, always the same, when all of them call it. The compiler knows that
// what this guards runs in a single thread: addresses stay in uniform registers. With any other
// choice of the thread, each TMA instruction is a loop over the threads that might be active.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected));
  return elected != 0;
}

}  // namespace pixelfly::device
