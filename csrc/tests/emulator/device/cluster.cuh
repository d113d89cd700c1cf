// Clusters on the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace pixelfly::device {

inline void cluster_sync() { emulator::cluster_sync(); }
template <typename T>
void store_shared_of(int block, uint32_t address, T value) {
  constexpr uint32_t kBytes = sizeof(T);
  std::memcpy(emulator::shared_bytes_of(static_cast<unsigned>(block), address, kBytes), &value,
              kBytes);
}
inline void fence_proxy_async_cluster() { emulator::fence_async(); }
inline void mbarrier_arrive_of(int block, uint32_t barrier) {
  emulator::barrier_arrive_of(static_cast<unsigned>(block), barrier);
}
inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  emulator::barrier_wait(barrier, parity);
}

}  // namespace pixelfly::device
