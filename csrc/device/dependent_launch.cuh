// Programmatic dependent launch: a kernel started by launch_dependent_kernel() may begin while the
// kernel before it in the stream still runs.
#pragma once

namespace pixelfly::device {

// In the earlier kernel: from here on the dependent one may be started where there is room.
__device__ __forceinline__ void allow_dependent_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// In the dependent kernel: waits until the earlier one has ended and its writes can be read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Before that wait: brings a line of 128 bytes to L2, also while the earlier kernel writes to it.
__device__ __forceinline__ void prefetch_before_wait(const void* line) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#endif
}

}  // namespace pixelfly::device
