// t = x · vᵀ, and s = dz · u: a thin product, bound by reading x once; Hopper (sm_90a).
//
// A thread block makes 64 tokens x 64 ranks and walks all features; or 128 tokens, where there
// would be more thread blocks than run at once. An SM should have 130-190 KB in flight, so a ring
// is the longer, the fewer thread blocks share one. Where there are fewer thread blocks than SMs,
// each of which loads some 110 GB/s, a cluster's thread blocks (gridDim.z) share the features, and
// add their sums in each other's shared memory. The factor tile is wgmma's A (M = 64 ranks;
// transposed descriptors for u, whose rows are features), tokens are N; the accumulator holds tᵀ
// and leaves through stmatrix.trans and one TMA store, staged in the first ring stage.
//
//   shared memory: ring [stages] of x tile [kTokens][64] + factor tile (16 or 24 KB)
//   roles: warps 0-3 multiply, one thread of warp 4 loads, after the kernel before this one has
//   ended: a dependent launch
//   sums of a cluster: where the ring was
//   full[s]: producer -> consumers; empty[s]: the four consumer warps -> producer
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "device/cluster.cuh"
#include "device/convert.cuh"
#include "device/dependent_launch.cuh"
#include "device/elect.cuh"
#include "device/ldmatrix.cuh"
#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/ring.cuh"
#include "kernels/thirds.cuh"
#include "kernels/tile_sm90.cuh"

namespace pixelfly {

constexpr int kLowRankTile = 64;
constexpr int kLowRankTileBytes = kLowRankTile * kLowRankTile * 2;
constexpr int kLowRankMaxStages = 8;
constexpr int kLowRankThreads = 160;
constexpr int low_rank_stage_bytes(int tokens) {
  return (tokens / kLowRankTile + 1) * kLowRankTileBytes;
}

struct LowRankMaps {
  CUtensorMap x[3];    // [T, features]; kThirds: three thirds of it, else one map
  CUtensorMap factor;  // v [r, K] (transposed: u [N, r])
  CUtensorMap t;       // [T, r]
  // Boxes are 64 x 64; those of x and t have as many tokens as a thread block makes, in a cluster
  // those of t 64 / gridDim.z.
};

struct LowRankArgs {
  int32_t num_tiles;  // of features
  int32_t stages;
  bool early_start;  // the next kernel may be placed meanwhile
};

template <typename T, bool kTransposed, bool kThirds, int kTokens>
__global__ void __launch_bounds__(kLowRankThreads)
    low_rank_sm90(const __grid_constant__ LowRankMaps maps, const LowRankArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kHalves = kTokens / kLowRankTile;
  constexpr int kStageBytes = low_rank_stage_bytes(kTokens);
  constexpr int kXBytes = kStageBytes - kLowRankTileBytes;
  __shared__ uint64_t barriers[2 * kLowRankMaxStages];
  const uint32_t base = (device::smem_address(device::dynamic_shared()) + 1023) & ~1023u;
  const uint32_t full = device::smem_address(barriers), empty = full + 8 * kLowRankMaxStages;
  const int token = blockIdx.x * kTokens, rank = blockIdx.y * kLowRankTile;
  const int blocks = gridDim.z, part = blockIdx.z;
  const int first = part * args.num_tiles / blocks;
  const int steps = (part + 1) * args.num_tiles / blocks - first;
  if (threadIdx.x == 0) {
    for (int s = 0; s < args.stages; ++s) {
      device::mbarrier_init(full + 8 * s, 1);
      device::mbarrier_init(empty + 8 * s, 4);
    }
    device::mbarrier_init_fence();
  }
  __syncthreads();
  if (args.early_start) device::allow_dependent_launch();

  if (threadIdx.x >= 128) {
    if (!device::elect_one()) return;
    device::wait_for_previous_kernel();
    Ring ring{args.stages};
    for (int i = 0; i < steps; ++i, ring.advance()) {
      const uint32_t x = base + ring.stage * kStageBytes, bar = full + 8 * ring.stage;
      device::mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
      device::mbarrier_expect_tx(bar, kStageBytes);
      const int tile = first + i, feature = tile * kLowRankTile;
      TilePlace place{0, tile};
      if constexpr (kThirds) place = place_of_tile(tile, args.num_tiles / 3);
      device::tma_load_2d(x, &maps.x[place.matrix], bar, place.tile * kLowRankTile, token);
      device::tma_load_2d(x + kXBytes, &maps.factor, bar, kTransposed ? rank : feature,
                          kTransposed ? feature : rank);
    }
    return;
  }

  float acc[32 * kHalves];
  Ring ring{args.stages};
  for (int i = 0; i < steps; ++i, ring.advance()) {
    const uint32_t x = base + ring.stage * kStageBytes;
    const uint64_t a = weight_descriptor<kTransposed>(x + kXBytes);
    const uint64_t b = device::descriptor_k_major(x);
    device::mbarrier_wait(full + 8 * ring.stage, ring.phase);
    multiply_by_weights<T, kTransposed>(acc, a, b, i);
    device::wgmma_wait<1>();
    if (i > 0 && threadIdx.x % 32 == 0) {
      device::mbarrier_arrive(empty + 8 * ring.before(1));
    }
  }
  device::wgmma_wait<0>();
  if constexpr (kTokens == kLowRankTile) {
    if (blocks > 1) {
      device::cluster_sync();  // all products have read their stages
      add_over_cluster(acc, base + threadIdx.x * 16);
    }
  }
  device::named_barrier_sync(1, 128);  // the first stage, or the cluster's sums, have been read
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane / 8;
#pragma unroll
  for (int j = 0; j < 4 * kHalves; ++j) {
    if (j * 16 * blocks >= kTokens) break;  // in a cluster of eight, 8 of 16 are stored
    uint32_t r[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) r[h] = device::pack2<T>(acc[j * 8 + h * 2], acc[j * 8 + h * 2 + 1]);
    const int row = j * 16 + (matrix / 2) * 8 + lane % 8, chunk = warp * 2 + matrix % 2;
    device::stmatrix_x4_trans(base + row * 128 + ((chunk ^ (row & 7)) << 4), r);
  }
  device::fence_proxy_async();
  device::named_barrier_sync(1, 128);
  if (threadIdx.x == 0) {
    device::tma_store_2d(&maps.t, base, rank, token + part * kTokens / blocks);
    device::tma_store_commit();
    device::tma_store_wait<0>();
  }
#endif
}

}  // namespace pixelfly
