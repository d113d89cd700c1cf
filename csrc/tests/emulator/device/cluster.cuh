// Clusters on the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace pixelfly::device {

inline void cluster_sync() { emulator::cluster_sync(); }
inline void store_shared_of(int block, uint32_t address, float4 value) {
  std::memcpy(emulator::shared_bytes_of(static_cast<unsigned>(block), address, 16), &value, 16);
}

}  // namespace pixelfly::device
