// mbarriers, named barriers and the proxy fence on the emulator.
#pragma once

#include <cuda_runtime.h>

namespace pixelfly::device {

inline void mbarrier_init(uint32_t barrier, int arrivals) {
  emulator::barrier_init(barrier, arrivals);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  emulator::barrier_expect(barrier, bytes);
}
inline void mbarrier_arrive(uint32_t barrier, int count = 1) {
  emulator::barrier_arrive(barrier, count);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::barrier_wait(barrier, parity);
}
inline void named_barrier_sync(int id, int threads) { emulator::named_sync(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emulator::named_arrive(id, threads); }
inline void fence_proxy_async() { emulator::fence_async(); }

}  // namespace pixelfly::device
