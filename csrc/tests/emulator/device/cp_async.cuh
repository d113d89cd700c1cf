// cp.async on the emulator: lands when waited for, or earlier.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace pixelfly::device {

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  std::memset(emulator::shared_bytes(shared, 16), 0xff, 16);
  emulator::copies().issue([=] {
    uint8_t* to = emulator::shared_bytes(shared, 16);
    if (valid) {
      std::memcpy(to, global, 16);
    } else {
      std::memset(to, 0, 16);
    }
  });
}
inline void cp_async_commit() {
  emulator::copies().commit();
  emulator::maybe_advance(emulator::copies());
}
template <int kPending>
void cp_async_wait() {
  emulator::copies().wait(kPending);
}

}  // namespace pixelfly::device
