// setmaxnreg: moves registers between warpgroups with different roles. Every warp of the warpgroup
// executes it; takes effect only in kernels with __launch_bounds__(threads, 1).
#pragma once

namespace pixelfly::device {

template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace pixelfly::device
