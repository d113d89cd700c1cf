// mma.sync on the emulator: lanes exchange their fragments, each computes its four results.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "device/convert.cuh"

namespace pixelfly::device {

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto& all = emulator::warp_exchange({a[0], a[1], a[2], a[3], b0, b1});
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  const auto half = [](uint32_t pair, int e) {
    const auto bits = static_cast<uint16_t>(pair >> 16 * e);
    T value;
    std::memcpy(&value, &bits, 2);
    return to_float(value);
  };
  for (int h = 0; h < 2; ++h) {    // row g + 8 h
    for (int e = 0; e < 2; ++e) {  // column 2 t + e
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        const int owner = k % 8 / 2;
        const auto& left = all[static_cast<size_t>(g * 4 + owner)];
        const auto& right = all[static_cast<size_t>((2 * t + e) * 4 + owner)];
        sum += half(left[static_cast<size_t>(h + k / 8 * 2)], k % 2) *
               half(right[static_cast<size_t>(4 + k / 8)], k % 2);
      }
      d[h * 2 + e] += sum;
    }
  }
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? bits : (bits + 0x1000) & ~0x1FFFu;  // to nearest, ties away
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto& all = emulator::warp_exchange({a[0], a[1], a[2], a[3], b0, b1});
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  const auto value = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  for (int h = 0; h < 2; ++h) {
    for (int e = 0; e < 2; ++e) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) {
        const auto& left = all[static_cast<size_t>(g * 4 + k % 4)];
        const auto& right = all[static_cast<size_t>((2 * t + e) * 4 + k % 4)];
        sum += value(left[static_cast<size_t>(h + k / 4 * 2)]) *
               value(right[static_cast<size_t>(4 + k / 4)]);
      }
      d[h * 2 + e] += sum;
    }
  }
}

}  // namespace pixelfly::device
