// ldmatrix and stmatrix on the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace pixelfly::device {

// Of a matrix row.
inline uint32_t aligned(uint32_t address) {
  if (address % 16 != 0) emulator::fail("a matrix row is not aligned to 16 bytes");
  return address;
}

template <bool kTrans>
void load_matrices(uint32_t (&r)[4], uint32_t address) {
  const auto& rows = emulator::warp_exchange({address});
  const int lane = emulator::lane(), major = lane / 4, minor = lane % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
      const int row = kTrans ? minor + e : major, col = kTrans ? major : minor + e;
      const uint32_t at = aligned(rows[static_cast<size_t>(m * 8 + row)][0]);
      pair |= uint32_t{reinterpret_cast<const uint16_t*>(emulator::shared_view(at, 16))[col]}
              << 16 * e;
    }
    r[m] = pair;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { load_matrices<false>(r, address); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  load_matrices<true>(r, address);
}
template <bool kTrans>
void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  const auto& rows = emulator::warp_exchange({address});
  const int lane = emulator::lane(), major = lane / 4, minor = lane % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    for (int e = 0; e < 2; ++e) {
      const int row = kTrans ? minor + e : major, col = kTrans ? major : minor + e;
      const uint32_t at = aligned(rows[static_cast<size_t>(m * 8 + row)][0]);
      reinterpret_cast<uint16_t*>(emulator::shared_bytes(at, 16))[col] =
          static_cast<uint16_t>(r[m] >> 16 * e);
      emulator::mark_written(at + static_cast<uint32_t>(col) * 2, 2);
    }
  }
}
inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  store_matrices<false>(address, r);
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  store_matrices<true>(address, r);
}

}  // namespace pixelfly::device
