// dB = dzᵀ x on the kept blocks, du = dzᵀ t, dv = sᵀ x, dbias = Σ dz: one pass over tokens, Hopper
// (sm_90a).
//
// A thread block takes one chunk (GradChunk) and one span of tokens. Two consumer warpgroups hold
// one column tile of [dz | s] each and multiply it with up to six column tiles of [x | t]: 6 x
// 64x64 fp32 accumulators, 192 registers a thread. Both operands come straight from their row-major
// tensors: rows are tokens, so tiles are MN-major for wgmma, A transposed and B transposed.
//
//   stage: [dz tiles: 1 or 2][x tiles: up to 9], each 32 tokens x 64 features, 4 KB, 128-byte
//   swizzle ones:  a constant K-major tile; dz times it is the sum over tokens, dbias full[s]:
//   producer -> consumers     empty[s]: the 8 consumer warps -> producer
//
// Producer: one TMA box a lane, its coordinates in registers (one thread reading a table was the
// bottleneck of the prototype). Partial sums go to the workspace in fragment order, fully
// coalesced; a second kernel adds the spans in order, so results are deterministic, and rounds
// once. With one span the results are written directly.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "device/convert.cuh"
#include "device/mbarrier.cuh"
#include "device/register_budget.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

constexpr int kGradTokens = 32;                          // tokens a stage
constexpr int kGradTileBytes = kGradTokens * 64 * 2;     // 4 KB
constexpr int kGradRingBytes = 5 * 11 * kGradTileBytes;  // 220 KB
constexpr int kGradMaxStages = 12;
constexpr int kGradOnesBytes = 1024;
constexpr int kGradSharedBytes = kGradRingBytes + kGradOnesBytes + 1024;
constexpr int kGradThreads = 384;
constexpr int kGradPartial = 64 * 64;  // fp32 values of an output tile

struct GradMaps {
  CUtensorMap dz, x, t, s;  // box 32 tokens x 64 features
};

struct GradKernelArgs {
  const GradChunk* chunks;  // device
  int32_t num_chunks;
  int32_t spans;
  int32_t span_steps;  // stages of kGradTokens tokens in a span
  int32_t total_steps;
  int32_t row_tiles, col_tiles;
  int32_t block_parts;     // block_size / 64
  const GroupQuad* quads;  // device; b = 32 only, else null
  int32_t out_features, in_features, rank, rank_tiles;
  void* dblocks;
  void* du;
  void* dv;
  void* dbias;
  float* partial;       // [span][chunk][warpgroup][output][64 * 64]
  float* bias_partial;  // [span][chunk][warpgroup][64]
};

namespace grad {

// Writes two neighbouring elements (row, col), (row, col + 1) of an output tile to its gradient.
template <typename T>
__device__ __forceinline__ void write_pair(const GradKernelArgs& args, int output, int row, int col,
                                           float a, float b) {
  const int index = output & kGradIndexMask;
  T* to;
  if (output < kGradDu) {
    if (args.dblocks == nullptr) return;
    if (args.quads != nullptr) {
      const int64_t block = args.quads[index].block[col / 32 * 2 + row / 32];
      if (block < 0) return;
      to = static_cast<T*>(args.dblocks) + (block * 32 + row % 32) * 32 + col % 32;
      *reinterpret_cast<uint32_t*>(to) = device::pack2<T>(a, b);
      return;
    }
    const int parts = args.block_parts, size = 64 * parts;
    const int64_t block = index / (parts * parts);
    const int r = index / parts % parts * 64 + row, c = index % parts * 64 + col;
    to = static_cast<T*>(args.dblocks) + (block * size + r) * size + c;
  } else if (output < kGradDv) {
    const int n = index / args.rank_tiles * 64 + row, r = index % args.rank_tiles * 64 + col;
    if (args.du == nullptr || n >= args.out_features || r >= args.rank) return;
    to = static_cast<T*>(args.du) + static_cast<int64_t>(n) * args.rank + r;
  } else {
    const int k = index / args.rank_tiles * 64 + col, r = index % args.rank_tiles * 64 + row;
    if (args.dv == nullptr || r >= args.rank || k >= args.in_features) return;
    to = static_cast<T*>(args.dv) + static_cast<int64_t>(r) * args.in_features + k;
  }
  *reinterpret_cast<uint32_t*>(to) = device::pack2<T>(a, b);
}

// Writes accumulator fragment j (four values) of a warpgroup thread.
template <typename T>
__device__ __forceinline__ void write_fragment(const GradKernelArgs& args, int output, int thread,
                                               int j, float4 v) {
  const int row = thread / 32 * 16 + thread % 32 / 4, col = j * 8 + thread % 4 * 2;
  write_pair<T>(args, output, row, col, v.x, v.y);
  write_pair<T>(args, output, row + 8, col, v.z, v.w);
}

template <typename T>
__device__ __forceinline__ void write_bias(const GradKernelArgs& args, int row_tile, int row,
                                           float sum) {
  const int n = row_tile * 64 + row;
  if (args.dbias != nullptr && n < args.out_features) {
    static_cast<T*>(args.dbias)[n] = device::from_float<T>(sum);
  }
}

// One consumer warpgroup with kOutputs accumulators.
template <typename T, int kOutputs>
__device__ void consume(const GradChunk& chunk, const GradKernelArgs& args, int warpgroup,
                        uint32_t ring, uint32_t ones, uint32_t bars, int stages, int steps,
                        int span, int chunk_index) {
  constexpr int kStepK = 128;  // descriptor units (16 bytes) of 16 token rows
  const int thread = threadIdx.x % 128;
  const uint32_t stage_bytes = (chunk.num_rows + chunk.num_tiles) * kGradTileBytes;
  float acc[kOutputs > 0 ? kOutputs : 1][32] = {};
  float sums[4] = {};
  const uint64_t a =
      device::descriptor_mn_major(ring + warpgroup % chunk.num_rows * kGradTileBytes, 0);
  const uint64_t one = device::descriptor_k_major(ones);
  uint64_t b[kOutputs > 0 ? kOutputs : 1];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    b[o] = device::descriptor_mn_major(
        ring + (chunk.num_rows + chunk.output_tile[warpgroup][o]) * kGradTileBytes, 0);
  }
  int stage = 0, previous = -1;
  uint32_t phase = 0;
  for (int i = 0; i < steps; ++i) {
    device::mbarrier_wait(bars + stage * 16, phase);
    const uint64_t offset = static_cast<uint64_t>(stage * stage_bytes) >> 4;
    device::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kGradTokens / 16; ++k) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        device::wgmma<T, true, true>(acc[o], a + offset + k * kStepK, b[o] + offset + k * kStepK,
                                     1);
      }
      device::wgmma<T, true, false>(sums, a + offset + k * kStepK, one, 1);
    }
    device::wgmma_commit();
    device::wgmma_wait<1>();
    if (previous >= 0 && thread % 32 == 0) device::mbarrier_arrive(bars + previous * 16 + 8);
    previous = stage;
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  device::wgmma_wait<0>();

  const bool direct = args.spans == 1;
  const int64_t slot = (static_cast<int64_t>(span) * args.num_chunks + chunk_index) * 2 + warpgroup;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    float4* partial =
        reinterpret_cast<float4*>(args.partial + (slot * kGradOutputs + o) * kGradPartial);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 v =
          make_float4(acc[o][j * 4], acc[o][j * 4 + 1], acc[o][j * 4 + 2], acc[o][j * 4 + 3]);
      if (direct) {
        write_fragment<T>(args, chunk.output[warpgroup][o], thread, j, v);
      } else {
        partial[j * 128 + thread] = v;
      }
    }
  }
  if (chunk.bias[warpgroup] && thread % 4 == 0) {
    const int row = thread / 32 * 16 + thread % 32 / 4;
    if (direct) {
      write_bias<T>(args, chunk.row[warpgroup], row, sums[0]);
      write_bias<T>(args, chunk.row[warpgroup], row + 8, sums[2]);
    } else {
      args.bias_partial[slot * 64 + row] = sums[0];
      args.bias_partial[slot * 64 + row + 8] = sums[2];
    }
  }
}

__device__ inline void produce(const GradMaps& maps, const GradChunk& chunk,
                               const GradKernelArgs& args, uint32_t ring, uint32_t bars, int stages,
                               int first_step, int steps) {
  const int lane = threadIdx.x % 32, boxes = chunk.num_rows + chunk.num_tiles;
  const uint32_t stage_bytes = boxes * kGradTileBytes;
  const CUtensorMap* map = nullptr;
  int col = 0;
  if (lane < chunk.num_rows) {
    const bool from_s = chunk.row[lane] >= args.row_tiles;
    map = from_s ? &maps.s : &maps.dz;
    col = (chunk.row[lane] - (from_s ? args.row_tiles : 0)) * 64;
  } else if (lane < boxes) {
    const int tile = chunk.tile[lane - chunk.num_rows];
    const bool from_t = tile >= args.col_tiles;
    map = from_t ? &maps.t : &maps.x;
    col = (tile - (from_t ? args.col_tiles : 0)) * 64;
  }
  int stage = 0;
  uint32_t phase = 1;
  for (int i = 0; i < steps; ++i) {
    const uint32_t full = bars + stage * 16;
    device::mbarrier_wait(full + 8, phase);
    if (lane == 0) device::mbarrier_expect_tx(full, stage_bytes);
    __syncwarp();
    if (map != nullptr) {
      device::tma_load_2d(ring + stage * stage_bytes + lane * kGradTileBytes, map, full, col,
                          (first_step + i) * kGradTokens);
    }
    __syncwarp();
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
}

}  // namespace grad

template <typename T>
__global__ void __launch_bounds__(kGradThreads, 1)
    weight_grad_sm90(const __grid_constant__ GradMaps maps,
                     const __grid_constant__ GradKernelArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ GradChunk chunk;
  __shared__ uint64_t barriers[2 * kGradMaxStages];
  const uint32_t ring = (device::smem_address(device::dynamic_shared()) + 1023) & ~1023u;
  const uint32_t ones = ring + kGradRingBytes;
  const uint32_t bars = device::smem_address(barriers);
  const int chunk_index = blockIdx.x % args.num_chunks, span = blockIdx.x / args.num_chunks;
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(GradChunk) / 4); i += kGradThreads) {
    reinterpret_cast<int*>(&chunk)[i] = reinterpret_cast<const int*>(args.chunks + chunk_index)[i];
  }
  for (int i = threadIdx.x; i < kGradOnesBytes / 4; i += kGradThreads) {
    device::store_shared(ones + i * 4, device::pack2<T>(1.f, 1.f));
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < kGradMaxStages; ++s) {
      device::mbarrier_init(bars + s * 16, 1);
      device::mbarrier_init(bars + s * 16 + 8, 8);
    }
    device::mbarrier_init_fence();
  }
  device::fence_proxy_async();
  __syncthreads();

  const int stages =
      min(kGradMaxStages, kGradRingBytes / ((chunk.num_rows + chunk.num_tiles) * kGradTileBytes));
  const int first = span * args.span_steps;
  const int steps = min(args.span_steps, args.total_steps - first);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 2) {
    device::release_registers<24>();
    if (threadIdx.x < 288) {
      grad::produce(maps, chunk, args, ring, bars, stages, first, steps);
    }
  } else {
    device::claim_registers<240>();
    auto run = [&](auto count) {
      grad::consume<T, decltype(count)::value>(chunk, args, warpgroup, ring, ones, bars, stages,
                                               steps, span, chunk_index);
    };
    switch (chunk.num_outputs[warpgroup]) {
      case 0: run(std::integral_constant<int, 0>{}); break;
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      case 4: run(std::integral_constant<int, 4>{}); break;
      case 5: run(std::integral_constant<int, 5>{}); break;
      default: run(std::integral_constant<int, 6>{}); break;
    }
  }
#endif
}

// Adds the spans of every output in order. Grid: chunks x 2 warpgroups x (outputs + 1) x 8; the
// last output is dbias, the last index one of eight slices of an output tile, so that enough loads
// are in flight to cover their latency.
template <typename T>
__global__ void __launch_bounds__(128)
    reduce_weight_grad_sm90(const __grid_constant__ GradKernelArgs args) {
  const int j = blockIdx.x % 8, output = blockIdx.x / 8 % (kGradOutputs + 1);
  const int rest = blockIdx.x / (8 * (kGradOutputs + 1));
  const int warpgroup = rest % 2, chunk_index = rest / 2, thread = threadIdx.x;
  const GradChunk& chunk = args.chunks[chunk_index];
  const int64_t slot = static_cast<int64_t>(chunk_index) * 2 + warpgroup;
  const int64_t slots = static_cast<int64_t>(args.num_chunks) * 2;
  if (output == kGradOutputs) {
    if (j > 0 || !chunk.bias[warpgroup] || thread >= 64) return;
    float sum = 0.f;
#pragma unroll 8
    for (int s = 0; s < args.spans; ++s) sum += args.bias_partial[(s * slots + slot) * 64 + thread];
    grad::write_bias<T>(args, chunk.row[warpgroup], thread, sum);
    return;
  }
  if (output >= chunk.num_outputs[warpgroup]) return;
  const float4* partial = reinterpret_cast<const float4*>(
                              args.partial + (slot * kGradOutputs + output) * kGradPartial) +
                          j * 128 + thread;
  const int64_t step = slots * kGradOutputs * (kGradPartial / 4);
  float4 sum = {};
#pragma unroll 8
  for (int s = 0; s < args.spans; ++s) {
    const float4 v = __ldcs(partial + s * step);
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
  }
  grad::write_fragment<T>(args, chunk.output[warpgroup][output], thread, j, sum);
}

}  // namespace pixelfly
