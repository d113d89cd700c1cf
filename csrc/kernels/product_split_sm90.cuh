// y = act(x · Bᵀ + t · uᵀ + bias) + residual, and dx = (dz · B + s · v) ⊙ slope, of few tokens;
// Hopper (sm_90a).
//
// product_sm90 has a thread block for two output tiles of 128 tokens, which walks all of their
// contraction: with few tokens most multiprocessors are idle. Here a thread block makes one output
// tile (64 features) of 64 or 128 tokens, a warpgroup 64 of them, and a cluster's thread blocks
// (gridDim.z) share the contraction. They add their sums in each other's shared memory, each those
// of its part of the tokens, which it finishes and stores. Or those of long rows alone (dense ones)
// do: of the others each thread block of a cluster makes one.
//
//   shared memory: ring [stages] of a weight tile [64][64] and a warpgroup's x tile [64 tokens][64]
//                  each, in the 128-byte swizzle; in a cluster, what it adds (tile_sm90.cuh).
//                  After the products, where the ring was: sums [64 tokens][64 features + 4] of
//                  each warpgroup
//   roles: a warpgroup for 64 tokens multiplies, the last warp loads
//   full[s]: producer -> consumers; empty[s]: the consumers' warps -> producer
//
// A dependent launch: before it waits for the kernel before it, it reads nothing but the plan.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "device/cluster.cuh"
#include "device/dependent_launch.cuh"
#include "device/elect.cuh"
#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/four_outputs.cuh"
#include "kernels/product_sm90_work.cuh"
#include "kernels/thirds.cuh"
#include "kernels/tile_sm90.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

constexpr int kSplitTokens = 64;  // of a warpgroup
constexpr int kMostSplitWarpgroups = 2;
constexpr int kMostSplitStages = 6;
constexpr int kMostSplitThreads = kMostSplitWarpgroups * 128 + 32;
// Two thread blocks fit a multiprocessor; where there are no more of them than multiprocessors, and
// no large clusters, each asks for memory that leaves no room for a second (csrc/README.md).
constexpr int kSplitSharedTiles = 13;
constexpr int kSplitSharedBytes = kSplitSharedTiles * kGroupTileBytes + 1024;
constexpr int kSplitSharedBytesAlone = 120 * 1024;
static_assert(2 * kSplitSharedBytesAlone > 228 * 1024, "what a multiprocessor has");

constexpr int split_stages(int warpgroups, int cluster) {
  const int sums = cluster > 1 ? warpgroups * kClusterSumsBytes / kGroupTileBytes : 0;
  return (kSplitSharedTiles - sums) / (warpgroups + 1);
}
static_assert(split_stages(1, 1) == kMostSplitStages);

struct SplitMaps {
  CUtensorMap x[3];  // [T, in], or three thirds of it; boxes of all the thread block's tokens x 64
  CUtensorMap t;     // [T, r], likewise
  CUtensorMap blocks;  // [nnz * b, b], box 64 x 64
  CUtensorMap factor;  // u [N, r] (transposed: v [r, K]), likewise
};

struct SplitArgs {
  ProductParams p;
  const int32_t* row_ptr;    // [block rows + 1]; dx: of block columns
  const int32_t* col_idx;    // [nnz]; dx: block rows
  const int32_t* block_idx;  // [nnz], dx only: blocks column by column
  const int32_t* order;      // of output tiles; null: ascending, all are shared
  int32_t rows;              // output tiles
  int32_t shared_rows;       // the first of them, which clusters share
  int32_t block_shift;       // log2(b / 64)
  int32_t rank_tiles;        // of 64
  int32_t third_tiles;       // of x in each of its thirds; of all blocks if it is one matrix
  int32_t stages;
  bool early_start;  // the next kernel may be placed meanwhile
};

namespace split {

// What a thread block makes: `part` of `parts` of an output tile's sums, for a tile of tokens. Long
// rows start first, with all tokens.
struct Output {
  int row;  // -1: nothing
  int token_tile;
  int part, parts;

  __device__ explicit Output(const SplitArgs& args)
      : row(blockIdx.x), token_tile(blockIdx.y), part(blockIdx.z), parts(gridDim.z) {
    if (args.order == nullptr) return;
    row = blockIdx.y;
    token_tile = blockIdx.x;
    if (row >= args.shared_rows) {
      row = args.shared_rows + (row - args.shared_rows) * parts + part;
      part = 0;
      parts = 1;
    }
    row = row < args.rows ? __ldg(args.order + row) : -1;
  }
};

// What a thread block multiplies: of its output tile's blocks, in tiles of 64 features, and tiles
// of ranks.
struct Steps {
  int entry;         // of its first block
  int block_steps;   // of all
  int first, count;  // this thread block's

  __device__ Steps(const SplitArgs& args, const Output& output) {
    const int32_t* ends = args.row_ptr + (output.row >> args.block_shift);
    entry = __ldg(ends);
    block_steps = (__ldg(ends + 1) - entry) << args.block_shift;
    const int all = block_steps + args.rank_tiles;
    first = output.part * all / output.parts;
    count = (output.part + 1) * all / output.parts - first;
  }
};

// The tiles of a step.
struct Place {
  int x;            // map of x or, if it is kT, of t
  int x_column;     // where the tile begins
  int column, row;  // of the weight tile
};
constexpr int kT = 3;

template <bool kTransposed>
__device__ __forceinline__ Place place_of(const SplitArgs& args, const Steps& steps, int out_tile,
                                          int step) {
  if (step >= steps.block_steps) {
    const int rank = (step - steps.block_steps) * kGroupTile, out = out_tile * kGroupTile;
    return {kT, rank, kTransposed ? out : rank, kTransposed ? rank : out};
  }
  const int shift = args.block_shift, mask = (1 << shift) - 1;
  const int entry = steps.entry + (step >> shift), in = step & mask, out = out_tile & mask;
  const int block = kTransposed ? __ldg(args.block_idx + entry) : entry;
  const TilePlace x = place_of_tile((__ldg(args.col_idx + entry) << shift) + in, args.third_tiles);
  return {x.matrix, x.tile * kGroupTile, (kTransposed ? out : in) * kGroupTile,
          ((block << shift) + (kTransposed ? in : out)) * kGroupTile};
}

// One warp.
template <bool kTransposed>
__device__ void produce(const SplitMaps& maps, const SplitArgs& args, const Steps& steps, int row,
                        int token, uint32_t base, int stage_bytes, uint32_t full, uint32_t empty) {
  const int lane = threadIdx.x % 32;
  Ring ring{args.stages};
  for (int begin = 0; begin < steps.count; begin += 32) {
    Place mine{};
    if (begin + lane < steps.count) {
      mine = place_of<kTransposed>(args, steps, row, steps.first + begin + lane);
    }
    if (begin == 0) device::wait_for_previous_kernel();
    for (int i = 0; i < min(32, steps.count - begin); ++i) {
      const int x = __shfl_sync(0xffffffffu, mine.x, i);
      const int x_column = __shfl_sync(0xffffffffu, mine.x_column, i);
      const int weight_column = __shfl_sync(0xffffffffu, mine.column, i);
      const int weight_row = __shfl_sync(0xffffffffu, mine.row, i);
      device::mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
      if (device::elect_one()) {
        const uint32_t at = base + ring.stage * stage_bytes, bar = full + 8 * ring.stage;
        const bool is_t = x == kT;
        device::mbarrier_expect_tx(bar, stage_bytes);
        device::tma_load_2d(at, is_t ? &maps.factor : &maps.blocks, bar, weight_column, weight_row);
        device::tma_load_2d(at + kGroupTileBytes, is_t ? &maps.t : &maps.x[x], bar, x_column,
                            token);
      }
      ring.advance();
    }
  }
}

}  // namespace split

template <typename T, bool kTransposed>
__global__ void __launch_bounds__(kMostSplitThreads, 2)
    product_split_sm90(const __grid_constant__ SplitMaps maps,
                       const __grid_constant__ SplitArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ uint64_t barriers[2 * kMostSplitStages];
  const uint32_t dynamic = device::smem_address(device::dynamic_shared());
  const uint32_t base = (dynamic + 1023) & ~1023u;
  const uint32_t full = device::smem_address(barriers), empty = full + 8 * kMostSplitStages;
  const int warpgroups = blockDim.x / 128, cluster = gridDim.z;
  const int stage_bytes = (warpgroups + 1) * kGroupTileBytes;
  if (threadIdx.x == 0) {
    for (int s = 0; s < args.stages; ++s) {
      device::mbarrier_init(full + 8 * s, 1);
      device::mbarrier_init(empty + 8 * s, 4 * warpgroups);
    }
    device::mbarrier_init_fence();
  }
  if (cluster > 1) {
    device::cluster_sync();  // also: all of it have begun, and can be written to
  } else {
    __syncthreads();
  }
  if (args.early_start) device::allow_dependent_launch();

  const split::Output output(args);
  if (output.row < 0) return;
  const split::Steps steps(args, output);
  const int row = output.row, token = output.token_tile * warpgroups * kSplitTokens;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == warpgroups) {
    split::produce<kTransposed>(maps, args, steps, row, token, base, stage_bytes, full, empty);
    return;
  }

  // Of its cluster's 64 tokens a thread block stores parts of 8, a thread four features of a token
  // in each.
  const ProductParams& p = args.p;
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const int parts = 8 / output.parts,
            first_token = token + warpgroup * kSplitTokens + output.part * parts * 8;
  const int quad = thread % 16 * 4, n = row * kGroupTile + quad;
  const int count = min(4, p.out_features - n);
  const bool whole = count == 4;
  const int mine = first_token + thread / 16, left = static_cast<int>(p.tokens) - mine;
  device::wait_for_previous_kernel();
  // Before the products, beside which they arrive: bias, and slopes or residual.
  Four<T> bias{};
  if (!kTransposed && p.bias != nullptr) {
    bias = load_four(static_cast<const T*>(p.bias) + n, count, false);
  }
  using Slope = device::SlopeOf<T>;
  using Aux = std::conditional_t<kTransposed, Slope, T>;
  const auto* source = static_cast<const Aux*>(kTransposed ? p.slope : p.residual);
  const int64_t stride = kTransposed ? p.slope_stride : p.residual_stride;
  Four<Aux> aux[8]{};
  if (source != nullptr) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < parts && i * 8 < left) {
        aux[i] = load_four(source + (mine + i * 8) * stride + n, count, whole);
      }
    }
  }

  float acc[32] = {};
  Ring ring{args.stages};
  int previous = -1;
  for (int i = 0; i < steps.count; ++i) {
    const uint32_t at = base + ring.stage * stage_bytes;
    const uint64_t a = weight_descriptor<kTransposed>(at);
    const uint64_t b = device::descriptor_k_major(at + (1 + warpgroup) * kGroupTileBytes);
    device::mbarrier_wait(full + 8 * ring.stage, ring.phase);
    multiply_by_weights<T, kTransposed>(acc, a, b, i);
    device::wgmma_wait<1>();
    if (previous >= 0 && lane == 0) device::mbarrier_arrive(empty + 8 * previous);
    previous = ring.stage;
    ring.advance();
  }
  device::wgmma_wait<0>();
  if (output.parts > 1) {
    const uint32_t sums = base + args.stages * stage_bytes + warpgroup * kClusterSumsBytes;
    add_over_cluster(acc, sums + thread * 16);
  } else {
    device::named_barrier_sync(1, warpgroups * 128);  // the ring has been read
  }

  constexpr int kStride = kGroupTile + 4;  // writes meet no bank twice
  float* sums = reinterpret_cast<float*>(device::dynamic_shared() + (base - dynamic)) +
                warpgroup * kSplitTokens * kStride;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= parts) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int feature = warp * 16 + lane / 4 + e / 2 * 8;
      sums[(i * 8 + lane % 4 * 2 + e % 2) * kStride + feature] = acc[4 * i + e];
    }
  }
  device::named_barrier_sync(2 + warpgroup, 128);
  device::dispatch_activation(p.activation, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= parts || i * 8 >= left) break;
      const int at = (i * 8 + thread / 16) * kStride + quad;
      auto z = *reinterpret_cast<const Four<float>*>(sums + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) z.of[e] += device::to_float(bias.of[e]);
      Four<Slope> slopes{};
      Four<T> residual{};
      if constexpr (kTransposed) {
        slopes = aux[i];
      } else {
        residual = aux[i];
      }
      finish_four<T, kTransposed, decltype(tag)::value>(p, z, slopes, residual, mine + i * 8, n,
                                                        count, whole);
    }
  });
#endif
}

}  // namespace pixelfly
