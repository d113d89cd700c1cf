// Flags in global memory, by which thread blocks that run at the same time, perhaps of two kernels,
// tell each other that a tile is ready to be loaded by TMA.
#pragma once

#include <cuda_runtime.h>

namespace pixelfly::device {

// By the thread whose stores of the tile, by TMA, are complete (tma_store_wait).
__device__ __forceinline__ void raise_flag(int* flag) {
  asm volatile("fence.proxy.async;\nst.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ bool flag_is_up(const int* flag) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value != 0;
}
// Before TMA loads of the tile whose flag is up. They go past L1, which an acquire would empty.
__device__ __forceinline__ void wait_for_flag(const int* flag, bool up) {
  while (!up) up = flag_is_up(flag);
  asm volatile("fence.proxy.async;" ::: "memory");
}

}  // namespace pixelfly::device
