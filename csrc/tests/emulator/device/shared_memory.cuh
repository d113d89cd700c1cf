// Shared memory by 32-bit address.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace pixelfly::device {

inline uint8_t* dynamic_shared() { return emulator::dynamic_shared(); }
inline uint32_t smem_address(const void* p) { return emulator::shared_address(p); }
inline uint32_t opaque(uint32_t value) { return value; }

template <typename T>
void store_shared_value(uint32_t address, T value) {
  std::memcpy(emulator::shared_bytes(address, sizeof(T)), &value, sizeof(T));
  emulator::mark_written(address, sizeof(T));
}
inline void store_shared(uint32_t address, uint32_t value) { store_shared_value(address, value); }
inline void store_shared(uint32_t address, uint4 value) { store_shared_value(address, value); }
inline uint4 load_shared_vector(uint32_t address) {
  uint4 v;
  std::memcpy(&v, emulator::shared_view(address, 16), 16);
  return v;
}
inline uint32_t load_shared_word(uint32_t address) {
  uint32_t x;
  std::memcpy(&x, emulator::shared_view(address, 4), 4);
  return x;
}
inline float load_shared_float(uint32_t address) {
  float x;
  std::memcpy(&x, emulator::shared_view(address, 4), 4);
  return x;
}

}  // namespace pixelfly::device
