// wgmma on the emulator: each thread computes its own part of the product when the group completes.
// Descriptors and fragments are the hardware's, see csrc/device/wgmma.cuh.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <vector>

#include "device/convert.cuh"

namespace pixelfly::device {

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kSwizzle64 = uint64_t{2} << 62;
constexpr uint64_t kGroupStride = uint64_t{64} << 32;

inline uint64_t make_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                uint64_t mode) {
  if (address % 16 != 0) emulator::fail("a wgmma operand is not aligned to 16 bytes");
  return (address & 0x3FFFFu) >> 4 | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 |
         mode;
}
inline uint64_t descriptor_k_major(uint32_t address) {
  return make_descriptor(address, 16, 1024, kSwizzle128);
}
inline uint64_t descriptor_mn_major(uint32_t address, uint32_t chunk_bytes) {
  return make_descriptor(address, chunk_bytes, 1024, kSwizzle128);
}
constexpr uint64_t kDescriptorHigh = kSwizzle128 | kGroupStride;
inline uint32_t descriptor_low(uint32_t address, uint32_t chunk_bytes) {
  return static_cast<uint32_t>(descriptor_mn_major(address, chunk_bytes));
}
inline uint64_t descriptor_repeated(uint32_t address) { return make_descriptor(address, 0, 0, 0); }
constexpr int kQuadBytes = 2048;
inline uint64_t descriptor_quads(uint32_t address, bool mn_major) {
  return make_descriptor(address, mn_major ? kQuadBytes : 16, 512, kSwizzle64);
}
inline uint64_t descriptor_narrow(uint32_t address) { return descriptor_quads(address, true); }
constexpr int quads_step(int k, bool mn_major) {
  return (k / 2 * 2 * kQuadBytes + k % 2 * (mn_major ? 16 * 64 : 32)) >> 4;
}

// Element (mn, k) of the operand a descriptor points at.
template <typename T, bool kMnMajor>
float operand(uint64_t descriptor, int mn, int k) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t at;
  if (descriptor >> 62 == 0) {  // parts of 8 rows of 16 bytes, not swizzled
    at = start + static_cast<uint32_t>(mn / 8) * stride + static_cast<uint32_t>(k / 8) * leading +
         static_cast<uint32_t>(mn % 8 * 16 + k % 8 * 2);
  } else {
    const int span = descriptor >> 62 == 1 ? 128 : 64;  // bytes of a swizzled row
    const int wide = kMnMajor ? mn : k, deep = kMnMajor ? k : mn;
    const int per_row = span / 2;
    at = start + static_cast<uint32_t>(deep / 8) * stride +
         static_cast<uint32_t>(deep % 8 * span + wide % per_row * 2);
    if (wide >= per_row) at += static_cast<uint32_t>(wide / per_row) * leading;
    at = emulator::swizzle(at, span);
  }
  emulator::check_fenced(at, 2, "wgmma");
  return to_float(*reinterpret_cast<const T*>(emulator::shared_view(at, 2)));
}

// What 128 threads would read and multiply each for itself is kept as long as the shared memory
// that it came from holds.
struct Kept {
  const void* memory = nullptr;
  uint64_t version = 0, a = 0, b = 0;
  std::vector<float> values;
};
constexpr size_t kKept = 256;
inline size_t place_of(uint64_t a, uint64_t b) {
  return (a * 0x9E3779B97F4A7C15u ^ b * 0xC2B2AE3D27D4EB4Fu) >> 56;
}

// The values of that key, which `make` writes unless they are there.
template <typename F>
const std::vector<float>& keep(Kept (&kept)[kKept], uint64_t a, uint64_t b, F make) {
  Kept& one = kept[place_of(a, b)];
  const void* memory = emulator::shared_memory();
  const uint64_t version = emulator::shared_version();
  if (one.memory != memory || one.version != version || one.a != a || one.b != b) {
    make(one.values);
    one.memory = memory;
    one.version = version;
    one.a = a;
    one.b = b;
  }
  return one.values;
}

// [16][kExtent].
template <typename T, bool kMnMajor, int kExtent>
void read_operand(uint64_t descriptor, std::vector<float>& values) {
  values.resize(16 * kExtent);
  float* value = values.data();
  for (int k = 0; k < 16; ++k) {
    for (int mn = 0; mn < kExtent; ++mn) *value++ = operand<T, kMnMajor>(descriptor, mn, k);
  }
}
template <typename T, bool kMnMajor, int kExtent>
const std::vector<float>& whole_operand(uint64_t descriptor) {
  static Kept kept[kKept];
  return keep(kept, descriptor, 0, [&](std::vector<float>& values) {
    read_operand<T, kMnMajor, kExtent>(descriptor, values);
  });
}

// a · b, [64][kN].
template <typename T, bool kTransA, bool kTransB, int kN>
const std::vector<float>& whole_product(uint64_t a, uint64_t b) {
  static Kept kept[kKept];
  return keep(kept, a, b, [&](std::vector<float>& values) {
    std::vector<float> left, right;
    read_operand<T, kTransA, 64>(a, left);
    read_operand<T, kTransB, kN>(b, right);
    values.assign(64 * kN, 0);
    for (size_t m = 0; m < 64; ++m) {
      for (size_t k = 0; k < 16; ++k) {
        const float x = left[k * 64 + m];
        for (size_t n = 0; n < kN; ++n) values[m * kN + n] += x * right[k * kN + n];
      }
    }
  });
}

// The instructions are .sync.aligned: no lane runs ahead of its warp.
inline void wgmma_fence() { emulator::warp_exchange({}); }
inline void wgmma_commit() {
  emulator::products().commit();
  emulator::maybe_advance(emulator::products());
}
template <int kPending>
void wgmma_wait() {
  emulator::products().wait(kPending);
  emulator::warp_exchange({});
}

// This thread's part of the sums: calls f(register, row, column).
template <int kRegisters, typename F>
void for_sums(F f) {
  const int thread = emulator::thread_number() % 128;
  const int row = thread / 32 * 16 + thread % 32 / 4;
  for (int j = 0; j < kRegisters / 4; ++j) {
    for (int e = 0; e < 4; ++e) f(j * 4 + e, row + e / 2 * 8, j * 8 + thread % 4 * 2 + e % 2);
  }
}

template <typename T, bool kTransA, bool kTransB, int kRegisters>
void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, int accumulate) {
  float* out = d;
  emulator::products().issue([=] {
    constexpr int kN = 2 * kRegisters;
    const std::vector<float>& sums = whole_product<T, kTransA, kTransB, kN>(a, b);
    for_sums<kRegisters>([&](int i, int row, int col) {
      const float sum = sums[static_cast<size_t>(row * kN + col)];
      out[i] = accumulate ? out[i] + sum : sum;
    });
  });
}

// d (+)= a · b with a in registers.
template <typename T, bool kTransB, int kRegisters>
void wgmma_registers(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  // The warp's 16x16 part of a: lane 4 (row % 8) + column / 2 % 4 holds two columns in a register.
  const auto& lanes = emulator::warp_exchange({a[0], a[1], a[2], a[3]});
  std::array<std::array<float, 16>, 16> part;
  for (size_t r = 0; r < 4; ++r) {
    for (size_t lane = 0; lane < 32; ++lane) {
      const float2 pair = unpack2<T>(lanes[lane][r]);
      auto& row = part[lane / 4 + r % 2 * 8];
      row[lane % 4 * 2 + r / 2 * 8] = pair.x;
      row[lane % 4 * 2 + r / 2 * 8 + 1] = pair.y;
    }
  }
  float* out = d;
  emulator::products().issue([=] {
    constexpr int kN = 2 * kRegisters;
    const std::vector<float>& right = whole_operand<T, kTransB, kN>(b);
    for_sums<kRegisters>([&](int i, int row, int col) {
      const auto& left = part[static_cast<size_t>(row % 16)];
      float sum = 0;
      for (size_t k = 0; k < 16; ++k) sum += left[k] * right[k * kN + static_cast<size_t>(col)];
      out[i] = accumulate ? out[i] + sum : sum;
    });
  });
}

}  // namespace pixelfly::device
