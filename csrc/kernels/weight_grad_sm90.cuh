// dB = dzᵀ x on the kept blocks, du = dzᵀ t, dv = sᵀ x, dbias = Σ dz: one pass over tokens, Hopper
// (sm_90a).
//
// A thread block takes one chunk (GradChunk) and one span of tokens: up to twelve tiles of dz, s, x
// and t, multiplied as its two consumer warpgroups' runs say into up to six 64x64 fp32 accumulators
// each, 192 registers a thread. Operands come straight from their row-major tensors: rows are
// tokens, so tiles are MN-major for wgmma, A transposed and B transposed. A run is one wgmma of n =
// 64, 128 or 192, so that A is read from shared memory once for all of it: shared memory, written
// by TMA and read by wgmma, is as scarce here as L2's bandwidth.
//
//   stage: the chunk's tiles, each 32 tokens x 64 features, 4 KB, 128-byte swizzle
//   ones:  a constant K-major tile; dz times it is the sum over tokens, dbias
//   full[s]: producer -> consumers     empty[s]: the 8 consumer warps -> producer
//
// Producer: a thread in each of four warps, with the coordinates of its three TMA boxes in
// registers. dz may be three matrices. A dependent launch: before it waits for the kernel before
// this one, only the plan is read.
//
// Partial sums go to the workspace in fragment order, fully coalesced; a second kernel adds the
// spans in order, so results are deterministic, and rounds once. With one span the results are
// written directly.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "device/dependent_launch.cuh"
#include "device/elect.cuh"
#include "device/mbarrier.cuh"
#include "device/register_budget.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/thirds.cuh"
#include "kernels/weight_grad_sm90_outputs.cuh"
#include "pixelfly/grad_spans.h"
#include "pixelfly/params.h"

namespace pixelfly {

constexpr int kGradRingBytes = 5 * 11 * kGradTileBytes;  // 220 KB
static_assert(2 * kGradOutputs * 8 * kGradSharedFragment * 16 <= kGradRingBytes,
              "with one span the sums take its place");
constexpr int kGradMaxStages = 12;
constexpr int kGradOnesBytes = 1024;
constexpr int kGradSharedBytes = kGradRingBytes + kGradOnesBytes + 1024;
constexpr int kGradThreads = 384;

struct GradMaps {
  CUtensorMap of[6];  // by GradSource, then dz's other thirds; box 32 tokens x 64 features
};

namespace grad {

struct GradRing {
  uint32_t tiles, ones, bars, free;  // shared addresses; free: a barrier, all has been read
  uint32_t stage_bytes;
  int stages;
};

// Accumulators of kRuns runs of kSize outputs, and where their operands are.
template <int kRuns, int kSize>
struct Runs {
  float acc[kRuns > 0 ? kRuns : 1][32 * kSize];
  uint32_t a[kRuns > 0 ? kRuns : 1], b[kRuns > 0 ? kRuns : 1];

  __device__ __forceinline__ void init(const GradRun* run, uint32_t ring) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      a[i] = device::descriptor_low(ring + run[i].row * kGradTileBytes, 0);
      b[i] = device::descriptor_low(ring + run[i].first * kGradTileBytes,
                                    run[i].step * kGradTileBytes);
#pragma unroll
      for (int j = 0; j < 32 * kSize; ++j) acc[i][j] = 0.f;
    }
  }
  // `offset` of a stage and token step, in the descriptors' 16 bytes.
  template <typename T>
  __device__ __forceinline__ void multiply(uint32_t offset) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      device::wgmma<T, true, true>(acc[i], device::kDescriptorHigh | (a[i] + offset),
                                   device::kDescriptorHigh | (b[i] + offset), 1);
    }
  }
  // Writes the eight fragments of every output and moves on behind them.
  __device__ __forceinline__ void store(Fragments& to) const {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
#pragma unroll
      for (int j = 0; j < 8 * kSize; ++j) {
        const float* v = acc[i] + j * 4;
        *to.of_thread = make_float4(v[0], v[1], v[2], v[3]);
        to.of_thread += to.stride;
      }
    }
  }
};

// The sums over tokens of kTiles tiles of dz, for dbias: products with a tile of ones.
template <int kTiles>
struct TokenSums {
  float acc[kTiles > 0 ? kTiles : 1][4] = {};
  uint32_t a[kTiles > 0 ? kTiles : 1];

  __device__ __forceinline__ void init(const int32_t* tiles, uint32_t ring) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      a[i] = device::descriptor_low(ring + tiles[i] * kGradTileBytes, 0);
    }
  }
  template <typename T>
  __device__ __forceinline__ void multiply(uint32_t offset, uint64_t ones) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      device::wgmma<T, true, false>(acc[i], device::kDescriptorHigh | (a[i] + offset), ones, 1);
    }
  }
};

// The loop over stages of a consumer warpgroup with kBias tiles to sum.
template <typename T, int kBias, typename Threes, typename Twos, typename Ones>
__device__ __forceinline__ void multiply_stages(Threes& threes, Twos& twos, Ones& ones,
                                                const GradChunk& chunk, const GradKernelArgs& args,
                                                int warpgroup, const GradRing& ring, int steps,
                                                int span, int chunk_index) {
  constexpr int kStepK = 128;  // descriptor units (16 bytes) of 16 token rows
  const int thread = threadIdx.x % 128;
  const uint64_t one = device::descriptor_k_major(ring.ones);
  TokenSums<kBias> sums;
  sums.init(chunk.bias[warpgroup], ring.tiles);
  int stage = 0, previous = -1;
  uint32_t phase = 0;
  for (int i = 0; i < steps; ++i) {
    device::mbarrier_wait(ring.bars + stage * 16, phase);
    const uint32_t offset = stage * ring.stage_bytes >> 4;
    device::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kGradTokens / 16; ++k) {
      threes.template multiply<T>(offset + k * kStepK);
      twos.template multiply<T>(offset + k * kStepK);
      ones.template multiply<T>(offset + k * kStepK);
      sums.template multiply<T>(offset + k * kStepK, one);
    }
    device::wgmma_commit();
    device::wgmma_wait<1>();
    if (previous >= 0 && thread % 32 == 0) device::mbarrier_arrive(ring.bars + previous * 16 + 8);
    previous = stage;
    if (++stage == ring.stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  device::wgmma_wait<0>();
  if (kBias == 0 || thread % 4 != 0) return;
  const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < kBias; ++i) {
    if (args.spans == 1) {
      write_bias<T>(args, chunk, warpgroup, i, row, sums.acc[i][0]);
      write_bias<T>(args, chunk, warpgroup, i, row + 8, sums.acc[i][2]);
    } else {
      const int64_t slot =
          ((static_cast<int64_t>(span) * args.num_chunks + chunk_index) * 2 + warpgroup) *
              kGradBias +
          i;
      args.bias_partial[slot * 64 + row] = sums.acc[i][0];
      args.bias_partial[slot * 64 + row + 8] = sums.acc[i][2];
    }
  }
}

// One consumer warpgroup with runs of three outputs, of two and of one.
template <typename T, int kThrees, int kTwos, int kOnes>
__device__ void consume(const GradChunk& chunk, const GradKernelArgs& args, int warpgroup,
                        const GradRing& ring, int steps, int span, int chunk_index) {
  Runs<kThrees, 3> threes;
  Runs<kTwos, 2> twos;
  Runs<kOnes, 1> ones;
  threes.init(chunk.run[warpgroup], ring.tiles);
  twos.init(chunk.run[warpgroup] + kThrees, ring.tiles);
  ones.init(chunk.run[warpgroup] + kThrees + kTwos, ring.tiles);
  auto multiply = [&](auto bias) {
    multiply_stages<T, decltype(bias)::value>(threes, twos, ones, chunk, args, warpgroup, ring,
                                              steps, span, chunk_index);
  };
  switch (chunk.num_bias[warpgroup]) {
    case 0: multiply(std::integral_constant<int, 0>{}); break;
    case 1: multiply(std::integral_constant<int, 1>{}); break;
    default: multiply(std::integral_constant<int, 2>{}); break;
  }

  // Without other spans the sums take the place of the ring, which nobody reads any more.
  if (args.spans == 1) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) device::mbarrier_arrive(ring.free);
    device::mbarrier_wait(ring.free, 0);
  }
  Fragments to(args, warpgroup, span, chunk_index);
  threes.store(to);
  twos.store(to);
  ones.store(to);
}

// A thread in each warp of a warpgroup, as loads can be no faster than threads ask for them: each
// loads every fourth tile.
__device__ inline void produce(const GradMaps& maps, const GradChunk& chunk, const GradRing& ring,
                               int dz_tiles, int first_step, int steps) {
  constexpr int kWarps = 4, kTiles = kGradTiles / kWarps;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x % 128 / 32, 0);
  if (!device::elect_one()) return;
  const int count = (chunk.num_tiles - warp + kWarps - 1) / kWarps;
  const CUtensorMap* map[kTiles];
  int col[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int tile = j < count ? chunk.tile[j * kWarps + warp] : 0, source = tile & 3;
    TilePlace place{0, tile >> 2};
    if (source == kGradDz) place = place_of_tile(place.tile, dz_tiles);
    map[j] = &maps.of[place.matrix > 0 ? kGradT + place.matrix : source];
    col[j] = place.tile * 64;
  }
  int stage = 0;
  uint32_t phase = 1;
  for (int i = 0; i < steps; ++i) {
    const uint32_t full = ring.bars + stage * 16;
    const uint32_t first = ring.tiles + stage * ring.stage_bytes + warp * kGradTileBytes;
    device::mbarrier_wait(full + 8, phase);
    if (warp == 0) device::mbarrier_expect_tx(full, ring.stage_bytes);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j >= count) break;
      device::tma_load_2d(first + j * kWarps * kGradTileBytes, map[j], full, col[j],
                          (first_step + i) * kGradTokens);
    }
    if (++stage == ring.stages) {
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
  __shared__ uint64_t barriers[2 * kGradMaxStages + 1];
  grad::GradRing ring;
  ring.tiles = (device::smem_address(device::dynamic_shared()) + 1023) & ~1023u;
  ring.ones = ring.tiles + kGradRingBytes;
  ring.bars = device::smem_address(barriers);
  ring.free = ring.bars + 2 * kGradMaxStages * 8;
  const int chunk_index = blockIdx.x % args.num_chunks, span = blockIdx.x / args.num_chunks;
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(GradChunk) / 4); i += kGradThreads) {
    reinterpret_cast<int*>(&chunk)[i] = reinterpret_cast<const int*>(args.chunks + chunk_index)[i];
  }
  for (int i = threadIdx.x; i < kGradOnesBytes / 4; i += kGradThreads) {
    device::store_shared(ring.ones + i * 4, device::pack2<T>(1.f, 1.f));
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < kGradMaxStages; ++s) {
      device::mbarrier_init(ring.bars + s * 16, 1);
      device::mbarrier_init(ring.bars + s * 16 + 8, 8);
    }
    device::mbarrier_init(ring.free, 8);
    device::mbarrier_init_fence();
  }
  device::fence_proxy_async();
  __syncthreads();

  if (args.early_start || args.spans > 1) device::allow_dependent_launch();
  ring.stage_bytes = chunk.num_tiles * kGradTileBytes;
  ring.stages = min(kGradMaxStages, kGradRingBytes / static_cast<int>(ring.stage_bytes));
  const int first = span * args.span_steps;
  const int steps = min(args.span_steps, args.total_steps - first);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 2) {
    device::release_registers<24>();
    device::wait_for_previous_kernel();
    grad::produce(maps, chunk, ring, args.dz_tiles, first, steps);
    return;
  }
  device::claim_registers<240>();
#define PIXELFLY_CONSUME(sizes, threes, twos, ones)                                               \
  case sizes:                                                                                     \
    grad::consume<T, threes, twos, ones>(chunk, args, warpgroup, ring, steps, span, chunk_index); \
    break;
  switch (chunk.sizes[warpgroup]) {  // kGradSizes
    PIXELFLY_CONSUME(0, 0, 0, 0)
    PIXELFLY_CONSUME(1, 0, 0, 1)
    PIXELFLY_CONSUME(2, 0, 1, 0)
    PIXELFLY_CONSUME(11, 0, 0, 2)
    PIXELFLY_CONSUME(3, 1, 0, 0)
    PIXELFLY_CONSUME(21, 0, 1, 1)
    PIXELFLY_CONSUME(111, 0, 0, 3)
    PIXELFLY_CONSUME(31, 1, 0, 1)
    PIXELFLY_CONSUME(22, 0, 2, 0)
    PIXELFLY_CONSUME(1111, 0, 0, 4)
    PIXELFLY_CONSUME(32, 1, 1, 0)
    PIXELFLY_CONSUME(221, 0, 2, 1)
    PIXELFLY_CONSUME(11111, 0, 0, 5)
    PIXELFLY_CONSUME(33, 2, 0, 0)
    PIXELFLY_CONSUME(321, 1, 1, 1)
    PIXELFLY_CONSUME(222, 0, 3, 0)
    PIXELFLY_CONSUME(2211, 0, 2, 2)
    PIXELFLY_CONSUME(111111, 0, 0, 6)
  }
#undef PIXELFLY_CONSUME
  if (args.spans == 1) grad::write_outputs<T>(chunk, args, warpgroup);
#endif
}

// Adds the spans of every output in order, kSlices of its eight slices (kGradPartial / 8 sums) in a
// thread block: a thread has its loads of several spans and slices under way. Grid: chunks x 2
// warpgroups x outputs x 8 / kSlices, then chunks x 2 warpgroups for dbias.
template <typename T, int kSlices>
__global__ void __launch_bounds__(128)
    reduce_weight_grad_sm90(const __grid_constant__ GradKernelArgs args) {
  static_assert(kGradBias * 64 == 128, "a thread a sum");
  if (args.early_start) device::allow_dependent_launch();
  constexpr int kParts = 8 / kSlices;
  const int thread = threadIdx.x, slots = args.num_chunks * 2;
  const int bias_slot = static_cast<int>(blockIdx.x) - slots * kGradOutputs * kParts;
  if (bias_slot >= 0) {
    const GradChunk& chunk = args.chunks[bias_slot / 2];
    const int warpgroup = bias_slot % 2;
    if (thread / 64 >= chunk.num_bias[warpgroup]) return;
    device::wait_for_previous_kernel();
    const float* partial = args.bias_partial + bias_slot * 128 + thread;
    float sum = 0.f;
#pragma unroll 8
    for (int s = 0; s < args.spans; ++s) sum += partial[int64_t{s} * slots * 128];
    grad::write_bias<T>(args, chunk, warpgroup, thread / 64, thread % 64, sum);
    return;
  }
  const int part = blockIdx.x % kParts, output = blockIdx.x / kParts % kGradOutputs;
  const int slot = blockIdx.x / (kParts * kGradOutputs), warpgroup = slot % 2;
  const GradChunk& chunk = args.chunks[slot / 2];
  if (output >= chunk.num_outputs[warpgroup]) return;
  const grad::Destination to(args, chunk.output[warpgroup][output]);
  device::wait_for_previous_kernel();
  const int64_t first = (int64_t{slot} * kGradOutputs + output) * kGradPartial;
  const int64_t step = int64_t{slots} * kGradOutputs * (kGradPartial / 4);
  const float4* partial =
      reinterpret_cast<const float4*>(args.partial + first) + part * kSlices * 128 + thread;
  float4 sum[kSlices] = {};
#pragma unroll(8 / kSlices)
  for (int s = 0; s < args.spans; ++s) {
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
      const float4 v = __ldcs(partial + s * step + j * 128);
      sum[j].x += v.x;
      sum[j].y += v.y;
      sum[j].z += v.z;
      sum[j].w += v.w;
    }
  }
#pragma unroll
  for (int j = 0; j < kSlices; ++j) {
    grad::write_fragment<T>(args, to, thread, part * kSlices + j, sum[j]);
  }
}

}  // namespace pixelfly
