// The codes in which slopes (act'(z)) of bf16 tensors are kept: q stands for (q - 26) / 200, 255
// for NaN. That holds 0 and 1 exactly, and the slopes of every activation, which lie between -0.13
// and 1.13, in codes from 0 to 252. bf16 itself has steps of 1/256 and 1/128 on either side of 1.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/approx.cuh"
#include "device/convert.cuh"

namespace pixelfly::device {

struct SlopeCode {
  uint8_t code;
};
constexpr int kCodeOfZero = 26, kCodesPerOne = 200, kCodeOfNan = 255;

// What slopes of tensors of T are kept in: pixelfly::slope_dtype().
template <typename T>
struct SlopeStorage {
  using Type = T;
};
template <>
struct SlopeStorage<__nv_bfloat16> {
  using Type = SlopeCode;
};
template <typename T>
using SlopeOf = typename SlopeStorage<T>::Type;
template <typename T>
constexpr bool kSlopeCodes = std::is_same_v<SlopeOf<T>, SlopeCode>;

// Two codes, in bytes 0 and 2. As fp16 numbers from 1024 on, which are the whole ones: their sum
// with 1024 rounds to the code, and the low byte of NaN is NaN's. (Rounding the slope itself to
// fp16 first moves it by a tenth of a code at most.)
__device__ __forceinline__ uint32_t encode_slopes(float a, float b) {
  constexpr uint32_t kScale = 0x5a405a40, kOffset = 0x641a641a;  // 200, 1024 + 26
  return fma_half2(pack2<__half>(a, b), kScale, kOffset);
}

// The slope of byte i of `codes`, whose code is not NaN's; `selector` is slope_selector(i). In
// three instructions with the product it enters: the byte becomes a part of 128 + q / 256. Off by
// 1e-5 at most, a 500th of a step.
__device__ constexpr uint32_t slope_selector(int i) {
  return 0x7404u | static_cast<uint32_t>(i) << 4;
}
__device__ __forceinline__ float decode_slope(uint32_t codes, uint32_t selector) {
  constexpr float kScale = 256.f / kCodesPerOne, kOffset = (128 + kCodeOfZero / 256.f) * kScale;
  return fmaf(__uint_as_float(__byte_perm(codes, 0x43000000, selector)), kScale, -kOffset);
}

// Whether four codes hold NaN: bit 7 of a byte, the other bits mean nothing. (A byte of ones is the
// only one whose bit 7 goes when one is added, unless the byte below overflows, which is NaN too.)
constexpr uint32_t kNanFlags = 0x80808080;
__device__ __forceinline__ uint32_t nan_flags(uint32_t codes) {
  return codes & ~(codes + 0x01010101);
}

__device__ __forceinline__ float to_float(SlopeCode x) {
  const float step = 1.f / kCodesPerOne;
  return x.code == kCodeOfNan ? NAN : static_cast<float>(x.code - kCodeOfZero) * step;
}
template <>
__device__ __forceinline__ SlopeCode from_float<SlopeCode>(float x) {
  return {static_cast<uint8_t>(encode_slopes(x, x))};
}

}  // namespace pixelfly::device
