// wgmma: a warpgroup's m64 x n x k16 products, both operands in shared memory, fp32 accumulators.
//
// Operands are tiles in the 128-byte swizzle: rows of 64 16-bit elements. K-major: a row holds k; a
// k16 step is 32 bytes on. MN-major (kTrans*): a row holds m (or n) and rows are k; a k16 step is
// 16 rows, 2048 bytes, on. Descriptors count 16-byte units.
//
// Accumulator layout, warp w of the warpgroup, lane l: d[8 j + {0, 1}] is row 16 w + l / 4, columns
// 16 j + 2 (l % 4) + {0, 1}; d[.. + {2, 3}] is 8 rows below; d[8 j + 4 ..] is 8 columns on.
//
// The register lists are spelled out because asm operands cannot be looped over.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pixelfly::device {

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kGroupStride = uint64_t{64} << 32;  // 1024 bytes between groups of 8 rows

__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address) {
  return (static_cast<uint64_t>(address & 0x3FFFF) >> 4) | (uint64_t{1} << 16) | kGroupStride |
         kSwizzle128;
}
// `chunk_bytes`: distance between 64-wide chunks of m (or n); unused when there is one chunk.
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t address, uint32_t chunk_bytes) {
  return (static_cast<uint64_t>(address & 0x3FFFF) >> 4) |
         (static_cast<uint64_t>(chunk_bytes >> 4) << 16) | kGroupStride | kSwizzle128;
}
// In two parts: what differs between tiles in 32 bits, and the rest. With one chunk (0 bytes)
// K-major operands are described so too.
constexpr uint64_t kDescriptorHigh = kSwizzle128 | kGroupStride;
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address, uint32_t chunk_bytes) {
  return static_cast<uint32_t>(descriptor_mn_major(address, chunk_bytes));
}
// A descriptor of a 64x64 tile made of four 32x32 boxes (2 KB each, rows of 64 bytes, 64-byte
// swizzle), stored [k half][m half]: a k half is two k16 steps.
constexpr int kQuadBytes = 2048;
__device__ __forceinline__ uint64_t descriptor_quads(uint32_t address, bool mn_major) {
  constexpr uint64_t kRowGroup = uint64_t{512 >> 4} << 32;  // between groups of 8 rows
  const uint64_t chunk = mn_major ? kQuadBytes >> 4 : 1;    // between 32-wide chunks of m
  return (static_cast<uint64_t>(address & 0x3FFFF) >> 4) | (chunk << 16) | kRowGroup |
         (uint64_t{2} << 62);
}
// What k16 step k (0..3) adds to that descriptor.
__device__ constexpr int quads_step(int k, bool mn_major) {
  return (k / 2 * 2 * kQuadBytes + k % 2 * (mn_major ? 16 * 64 : 32)) >> 4;
}

// An MN-major operand of 64 k by 32, rows of 64 bytes in the 64-byte swizzle: a k16 step is 16
// rows, 1024 bytes, on.
__device__ __forceinline__ uint64_t descriptor_narrow(uint32_t address) {
  return descriptor_quads(address, true);
}

// A K-major operand whose 8x8 parts are all the same 128 bytes, not swizzled.
__device__ __forceinline__ uint64_t descriptor_repeated(uint32_t address) {
  return static_cast<uint64_t>(address & 0x3FFFF) >> 4;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <typename T, int kN, bool kTransA, bool kTransB>
struct Wgmma;

// Both types, from the accumulators as the instruction names and as operands, and the names of a,
// b, accumulate and the two transpositions that follow them.
#define PIXELFLY_WGMMA(N, REGISTERS, A, B, ACCUMULATE, TRANS_A, TRANS_B, ...)                \
  PIXELFLY_WGMMA_OF(__nv_bfloat16, "bf16", N, REGISTERS, A, B, ACCUMULATE, TRANS_A, TRANS_B, \
                    __VA_ARGS__)                                                             \
  PIXELFLY_WGMMA_OF(__half, "f16", N, REGISTERS, A, B, ACCUMULATE, TRANS_A, TRANS_B, __VA_ARGS__)
#define PIXELFLY_WGMMA_OF(TYPE, NAME, N, REGISTERS, A, B, ACCUMULATE, TRANS_A, TRANS_B, ...) \
  template <bool kTransA, bool kTransB>                                                      \
  struct Wgmma<TYPE, N, kTransA, kTransB> {                                                  \
    static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b,    \
                                               int accumulate) {                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                            \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME     \
                   " {" REGISTERS "}, " A ", " B ", p, 1, 1, " TRANS_A ", " TRANS_B ";\n}\n" \
                   : __VA_ARGS__                                                             \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(kTransA)), "n"(int(kTransB))); \
    }                                                                                        \
  };

// The accumulators of n64, n128 and n192: as the instruction names them, and as operands.
#define PIXELFLY_NAMES_64                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31"
#define PIXELFLY_SUMS_64                                                                          \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PIXELFLY_NAMES_128                                                   \
  PIXELFLY_NAMES_64                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "   \
  "%60, %61, %62, %63"
#define PIXELFLY_SUMS_128                                                                         \
  PIXELFLY_SUMS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), \
      "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]),  \
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),  \
      "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]),  \
      "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PIXELFLY_NAMES_192                                                   \
  PIXELFLY_NAMES_128                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
  "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "   \
  "%92, %93, %94, %95"
#define PIXELFLY_SUMS_192                                                                          \
  PIXELFLY_SUMS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), \
      "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),   \
      "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),   \
      "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),   \
      "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])

PIXELFLY_WGMMA(8, "%0, %1, %2, %3", "%4", "%5", "%6", "%7", "%8", "+f"(d[0]), "+f"(d[1]),
               "+f"(d[2]), "+f"(d[3]))
PIXELFLY_WGMMA(16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12", "+f"(d[0]),
               "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]))
PIXELFLY_WGMMA(32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16",
               "%17", "%18", "%19", "%20", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
               "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
               "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]))
PIXELFLY_WGMMA(64, PIXELFLY_NAMES_64, "%32", "%33", "%34", "%35", "%36", PIXELFLY_SUMS_64)
PIXELFLY_WGMMA(128, PIXELFLY_NAMES_128, "%64", "%65", "%66", "%67", "%68", PIXELFLY_SUMS_128)
PIXELFLY_WGMMA(192, PIXELFLY_NAMES_192, "%96", "%97", "%98", "%99", "%100", PIXELFLY_SUMS_192)

// The same with a in registers.
template <typename T, int kN, bool kTransB>
struct WgmmaRegisters;
#define PIXELFLY_WGMMA_REGISTERS(N, NAMES, A, B, ACCUMULATE, TRANS_B, ...)                \
  PIXELFLY_WGMMA_REGISTERS_OF(__nv_bfloat16, "bf16", N, NAMES, A, B, ACCUMULATE, TRANS_B, \
                              __VA_ARGS__)                                                \
  PIXELFLY_WGMMA_REGISTERS_OF(__half, "f16", N, NAMES, A, B, ACCUMULATE, TRANS_B, __VA_ARGS__)
#define PIXELFLY_WGMMA_REGISTERS_OF(TYPE, NAME, N, NAMES, A, B, ACCUMULATE, TRANS_B, ...) \
  template <bool kTransB>                                                                 \
  struct WgmmaRegisters<TYPE, N, kTransB> {                                               \
    static __device__ __forceinline__ void run(float (&d)[N / 2], const uint32_t (&a)[4], \
                                               uint64_t b, int accumulate) {              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                         \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME  \
                   " {" NAMES "}, {" A "}, " B ", p, 1, 1, " TRANS_B ";\n}\n"             \
                   : __VA_ARGS__                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), \
                     "n"(int(kTransB)));                                                  \
    }                                                                                     \
  };

PIXELFLY_WGMMA_REGISTERS(64, PIXELFLY_NAMES_64, "%32, %33, %34, %35", "%36", "%37", "%38",
                         PIXELFLY_SUMS_64)
PIXELFLY_WGMMA_REGISTERS(128, PIXELFLY_NAMES_128, "%64, %65, %66, %67", "%68", "%69", "%70",
                         PIXELFLY_SUMS_128)

#undef PIXELFLY_WGMMA
#undef PIXELFLY_WGMMA_OF
#undef PIXELFLY_WGMMA_REGISTERS
#undef PIXELFLY_WGMMA_REGISTERS_OF
#undef PIXELFLY_NAMES_64
#undef PIXELFLY_SUMS_64
#undef PIXELFLY_NAMES_128
#undef PIXELFLY_SUMS_128
#undef PIXELFLY_NAMES_192
#undef PIXELFLY_SUMS_192

// d (+)= a · b for one k16 step; accumulate == 0 overwrites d.
template <typename T, bool kTransA, bool kTransB, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b,
                                      int accumulate) {
  Wgmma<T, 2 * kRegisters, kTransA, kTransB>::run(d, a, b, accumulate);
}

// Likewise, a in registers in the layout of an mma fragment: a[0] is row l / 4, columns 2 (l % 4)
// + {0, 1}; a[1] 8 rows below; a[2] and a[3] 8 columns on.
template <typename T, bool kTransB, int kRegisters>
__device__ __forceinline__ void wgmma_registers(float (&d)[kRegisters], const uint32_t (&a)[4],
                                                uint64_t b, int accumulate) {
  WgmmaRegisters<T, 2 * kRegisters, kTransB>::run(d, a, b, accumulate);
}

}  // namespace pixelfly::device
